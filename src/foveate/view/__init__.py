"""Pictures of what was kept. Needs no display."""

from .overlay import SheetCell, SheetRow, overlay, save, sheet

__all__ = ["SheetCell", "SheetRow", "overlay", "save", "sheet"]
