"""The `llmapi` runtime's model: it hands over to the one in NVIDIA's container."""
