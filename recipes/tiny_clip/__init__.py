"""How tiny-clip was made: ``python -m recipes.tiny_clip``."""
