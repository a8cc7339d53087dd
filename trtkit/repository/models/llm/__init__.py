"""The model `llm`: what lies beside the package serving/ in a repository."""
