"""The `reference` runtime: executes a TRT-LLM checkpoint on a CPU behind the tensors of NVIDIA's tensorrt_llm model.

- model.py: the Triton side, copied into a model repository as `1/model.py`
- parameters.py: what config.pbtxt says beside tensors
- wire.py: Triton tensors to generations and back, with errors that name the tensor
- worker.py: the one background thread that admits, steps, reports and cancels
- inflight.py: in-flight batching, where requests join and leave a running batch between two tokens
- cache.py: the joined key/value cache
- generation.py: one request while it generates
- sampling.py: logits to tokens, with the semantics of TensorRT-LLM
"""
