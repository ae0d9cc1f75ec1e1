"""How the shipped model was made: ``python -m foveate.zoo.train``. See `__main__` for the stages."""
