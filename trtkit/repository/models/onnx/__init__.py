"""An ONNX model in Triton's python backend, for servers without the onnxruntime backend."""
