"""The python-backend models that are copied into model repositories.

preprocessing and postprocessing run in containers without trtkit and import nothing of it: their helpers are copied
along. Of the reference model only model.py is copied: it runs where trtkit is installed and imports the rest of itself.
"""
