"""Slow, obvious twins that the fast code is held against, and the yardsticks to compare the two."""

import pytest

pytest.register_assert_rewrite("tests.reference.checks")
