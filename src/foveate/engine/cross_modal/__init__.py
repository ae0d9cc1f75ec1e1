"""Fewer tokens where image and text meet in encoder layers: ViLT, METER, BridgeTower."""
