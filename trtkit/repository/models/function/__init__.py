"""A typed function in Triton's python backend."""
