"""`python -m foveate.cli`."""

from . import main

main()
