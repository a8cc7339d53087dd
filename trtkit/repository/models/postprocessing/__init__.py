"""The postprocessing model: tokens to text."""
