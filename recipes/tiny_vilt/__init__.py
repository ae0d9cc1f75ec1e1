"""How tiny-vilt and its student were made: ``python -m recipes.tiny_vilt``. `__main__` names the stages."""
