"""trtkit: from a Hugging Face checkpoint to a served, validated, load-tested Triton deployment.

Importing this package imports nothing heavy: neither numpy, torch nor transformers.
"""

__version__ = "0.1.0"
