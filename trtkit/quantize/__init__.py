"""Quantisation: calibrate, choose scales, write checkpoints of fewer bits, one layer in memory at a time."""
