"""Pictures of what was kept. Needs no display."""

from .overlay import SheetCell, SheetRow, overlay, save, sheet
from .patches import Panel, panels

__all__ = ["Panel", "SheetCell", "SheetRow", "overlay", "panels", "save", "sheet"]
