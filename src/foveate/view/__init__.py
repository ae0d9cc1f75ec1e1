"""Pictures of what was kept. Needs no display."""

from .overlay import SheetCell, SheetRow, overlay, save, sheet
from .patches import Panel, panels
from .strip import film_strip

__all__ = ["Panel", "SheetCell", "SheetRow", "film_strip", "overlay", "panels", "save", "sheet"]
