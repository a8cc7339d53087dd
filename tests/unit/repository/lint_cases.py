"""Small model repositories for tests of the linter, and what a case of them says.

Models are small python models. Names begin with `~`, which each case replaces by a prefix of its own, so that all of
them fit into the repository of one server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtkit.repository.lint import Server

CODE = """import json

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        policy = json.loads(args["model_config"]).get("model_transaction_policy", {})
        self.decoupled = policy.get("decoupled", False)

    def execute(self, requests):
        answers = [pb.InferenceResponse([pb.Tensor("B", np.zeros((1, 1), np.int32))]) for _ in requests]
        if not self.decoupled:
            return answers
        for request, answer in zip(requests, answers):
            request.get_response_sender().send(answer, pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
MODEL = """backend: "python"
max_batch_size: 8
input { name: "A" data_type: TYPE_INT32 dims: 1 }
output { name: "B" data_type: TYPE_INT32 dims: 1 }
instance_group { count: 1 kind: KIND_CPU }
"""
UNBATCHED = MODEL.replace("max_batch_size: 8\n", "")
DECOUPLED = MODEL + "model_transaction_policy { decoupled: true }\n"
Files = dict[str, str | bytes]


@dataclass(frozen=True)
class Case:
    """One repository.

    Attributes:
        files: content by path.
        rule: the finding that must be among the linter's; empty when it must find nothing worse than a hint.
        says: what the server says when it refuses, in its answer or its log; None when it serves.
        but: why the linter calls an error what the server does not refuse: it hangs, or it serves wrongly.
        load: the model that is loaded.
    """

    name: str
    files: Files
    rule: str = ""
    says: str | None = None
    but: str = ""
    load: str = "~m"

    def write(self, repository: Path, prefix: str) -> None:
        """Puts the models into a repository, under the prefix."""
        for name, content in self.files.items():
            path = repository / name.replace("~", prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            data = content.encode() if isinstance(content, str) else content
            path.write_bytes(data.replace(b"~", prefix.encode()))


def model(config: str | bytes, name: str = "~m", **files: str | bytes) -> Files:
    """One python model with this config; files by path in its folder, of which `code` is its model.py."""
    code = files.pop("code", CODE)
    return {f"{name}/config.pbtxt": config, f"{name}/1/model.py": code, **{f"{name}/{k}": v for k, v in files.items()}}


def changed(old: str, new: str, config: str = MODEL) -> Files:
    """The good model with one part of its config replaced."""
    assert config.count(old) >= 1, old
    return model(config.replace(old, new, 1))


def more(text: str, config: str = MODEL) -> Files:
    """The good model with more in its config."""
    return model(config + text)


def batching(text: str, config: str = MODEL) -> Files:
    return more(f"dynamic_batching {{ {text} }}", config)


def sequence(text: str, config: str = MODEL) -> Files:
    return more(f"sequence_batching {{ {text} }}", config)


def warmup(inputs: str, config: str = MODEL, **files: str | bytes) -> Files:
    return model(config + f'model_warmup {{ name: "w" batch_size: 1 {inputs} }}', **files)


def given(key: str, value: str) -> str:
    return f"inputs {{ key: {key!r} value {{ {value} }} }}".replace("'", '"')


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


STEP_A = (
    'step { model_name: "~a" model_version: -1 input_map { key: "A" value: "x" } output_map { key: "B" value: "t" } }'
)
STEP_B = (
    'step { model_name: "~b" model_version: -1 input_map { key: "A" value: "t" } output_map { key: "B" value: "y" } }'
)
ENSEMBLE = f"""platform: "ensemble"
max_batch_size: 8
input {{ name: "x" data_type: TYPE_INT32 dims: 1 }}
output {{ name: "y" data_type: TYPE_INT32 dims: 1 }}
ensemble_scheduling {{
{STEP_A}
{STEP_B}
}}
"""


def ensemble(
    old: str = "", new: str = "", a: str = MODEL, b: str = MODEL, text: str = ENSEMBLE, extra: Files | None = None
) -> Files:
    """An ensemble of two models, with one part of its config replaced."""
    assert old in text, old
    return {
        **model(a, "~a"),
        **model(b, "~b"),
        "~m/config.pbtxt": text.replace(old, new, 1) if old else text,
        "~m/1/.keep": "",
        **(extra or {}),
    }


NO_PROTO = "failed to read text proto"
A_ZERO = given("A", "data_type: TYPE_INT32 dims: 1 zero_data: true")
START = "control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }"

EMBEDDED = Server(
    release="24.10", gpus=0, cache=False, backends=frozenset({"python"}), agents=frozenset(), is_local=True
)
"""What nvidia-pytriton's server is: 2.51 of release 24.10, with the python backend alone."""
