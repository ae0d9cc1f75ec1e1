"""The vision tower: reading it, merging inside it, and vision encoders on their own."""
