"""Engine: what trtllm-build makes of a checkpoint. The only step that needs a GPU."""
