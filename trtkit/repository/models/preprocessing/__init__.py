"""The preprocessing model: text to tokens."""
