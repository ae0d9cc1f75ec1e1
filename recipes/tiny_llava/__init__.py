"""How tiny-llava was made: ``python -m recipes.tiny_llava``. `__main__` names the stages."""
