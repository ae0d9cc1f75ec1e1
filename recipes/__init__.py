"""How the models of `foveate.zoo` were trained. Not in the wheel: run from a checkout, or ``make zoo`` for all of it.

* ``python -m recipes.tiny_llava``: tiny-llava, from nothing.
* ``python -m recipes.tiny_clip``: tiny-clip, its companion, from tiny-llava's vision tower.
* ``python -m recipes.tiny_vilt``: tiny-vilt and its student tiny-vilt-pumer.

Beside them lies what they share: the training examples, the vocabulary, stages that go on after an interruption.
"""
