"""From a source to a TRT-LLM checkpoint and back.

`plan` says which elements go where, `stream` writes them, `readback` undoes the plan to verify a checkpoint or run it.
"""
