"""Model repositories: the generator, the linter and the models that are copied."""
