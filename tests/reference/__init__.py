"""Slow, obvious twins that the fast code is held against, and the yardsticks to compare the two."""
