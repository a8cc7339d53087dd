"""Text, stop strings and chat messages for the models that serve, copied as one package next to their model.py."""
