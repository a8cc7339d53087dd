"""The python-backend models that are copied into model repositories. They import nothing of trtkit."""
