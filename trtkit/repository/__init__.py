"""Model repositories: the tensor contract, config.pbtxt, the generator, the linter and the models that are copied."""
