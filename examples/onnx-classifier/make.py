"""Writes classifier.onnx: a small classifier of four numbers, with weights drawn from a seed.

python examples/onnx-classifier/make.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OUT = Path(__file__).parent / "classifier.onnx"


def classifier() -> onnx.ModelProto:
    """features FP32 [batch, 4] -> probabilities FP32 [batch, 3], label INT64 [batch]."""
    random = np.random.default_rng(0)
    weights = {
        "hidden": random.standard_normal((4, 16)).astype(np.float32),
        "out": random.standard_normal((16, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["features", "hidden"], ["projected"]),
        helper.make_node("Relu", ["projected"], ["activated"]),
        helper.make_node("MatMul", ["activated", "out"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    model = classifier()
    onnx.checker.check_model(model, full_check=True)
    OUT.write_bytes(model.SerializeToString(deterministic=True))
