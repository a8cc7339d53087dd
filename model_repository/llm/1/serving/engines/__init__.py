"""Engines that the serving model can drive: one file each, with a class `Engine` (see ../engine.py)."""
