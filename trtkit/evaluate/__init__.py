"""What a change to a model costs, measured on text: perplexity, agreement and divergence of two models.

`scores` compares the predictions of two models on the same tokens, `models` runs sources and checkpoints, `served` asks
a server, `comparison` joins them. Tokens come from the caller.
"""
