"""Unusual families in a real Triton server: a mixture of experts, ALiBi, and rope that changes with the length."""

from __future__ import annotations

import copy
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from trtkit import contract, pbtxt
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.deploy.local import running_server
from trtkit.errors import CheckFailedError
from trtkit.hf import open_source
from trtkit.repository.models import reference

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("reference_server")]

VOCABULARY = 131
PATIENCE_S = 60.0
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 3.0, 5.0, 7.0],
}
SHARED = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}
CONFIGS: dict[str, Any] = {
    "experts": transformers.Qwen3MoeConfig(
        **SHARED, num_key_value_heads=4, head_dim=16, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2
    ),
    "alibi": transformers.FalconConfig(
        **SHARED, alibi=True, multi_query=False, parallel_attn=False, bias=True, max_position_embeddings=64
    ),
    "long": transformers.Phi3Config(
        **SHARED,
        intermediate_size=96,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=LONG_ROPE,
        pad_token_id=0,
    ),
}
LAYOUTS = {"experts": {"tp": 2, "pp": 3}, "alibi": {"tp": 2, "pp": 1}, "long": {"tp": 4, "pp": 1}}
REQUESTS = ((3, 18), (30, 6), (9, 20), (1, 14), (17, 9), (12, 12))
"""Tokens of the prompt, tokens asked for: more requests than there are slots."""


def write_checkpoint(config: Any, folder: Path, tp: int = 1, pp: int = 1) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "source")
    source = open_source(folder / "source")
    convert(plan_conversion(source, CheckpointConfig(dtype="float32", tp=tp, pp=pp)), source, folder / "checkpoint")
    return folder / "checkpoint"


def add_model(repository: Path, name: str, checkpoint: Path, **parameters: str) -> None:
    message = pbtxt.model_config(
        name,
        inputs=contract.llm_inputs(reference=True),
        outputs=contract.llm_outputs(reference=True),
        max_batch_size=3,
        decoupled=False,
        backend="python",
        parameters={"checkpoint_dir": str(checkpoint), "exclude_input_in_output": "true", **parameters},
        dynamic_batching={},
    )
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(pbtxt.dumps(message))
    shutil.copy(Path(reference.__file__).parent / "model.py", version / "model.py")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of the model -> folder with its `source` and `checkpoint`."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, folder in folders.items():
        write_checkpoint(CONFIGS[name], folder, **LAYOUTS[name])
    return folders


@pytest.fixture(scope="module")
def client(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    repository = tmp_path_factory.mktemp("repository")
    for name, folder in sources.items():
        add_model(repository, name, folder / "checkpoint")
    with running_server(repository) as deployment, grpc.InferenceServerClient(deployment.grpc_url) as connection:
        yield connection


def prompt_of(seed: int, length: int) -> list[int]:
    tokens: list[int] = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def inputs(prompt: list[int], count: int) -> list[Any]:
    tensors = []
    for name, value in (("input_ids", [prompt]), ("input_lengths", [[len(prompt)]]), ("request_output_len", [[count]])):
        array = np.array(value, dtype=np.int32)
        tensors.append(grpc.InferInput(name, array.shape, "INT32"))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers says, one prompt at a time."""
    tokens = copy.deepcopy(model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer: list[int] = tokens[0, len(prompt) :].tolist()
    return answer


@pytest.mark.parametrize("name", CONFIGS)
def test_concurrent_answers_equal_those_of_the_source(name: str, client: Any, sources: dict[str, Path]) -> None:
    prompts = [prompt_of(seed, length) for seed, (length, _) in enumerate(REQUESTS)]
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for index, (_, count) in enumerate(REQUESTS):
        client.async_infer(
            name,
            inputs(prompts[index], count),
            callback=lambda result, error, index=index: answers.put((index, result, error)),
        )
    original = transformers.AutoModelForCausalLM.from_pretrained(sources[name] / "source", dtype=torch.float32).eval()
    for _ in REQUESTS:
        index, result, error = answers.get(timeout=PATIENCE_S)
        assert error is None
        expected = generated(original, prompts[index], REQUESTS[index][1])
        assert result.as_numpy("output_ids")[0, 0].tolist() == expected, f"prompt of {len(prompts[index])}"


def test_a_request_beyond_the_last_position_is_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"request_output_len: 40 .*; ask for 34 or fewer"):
        client.infer("alibi", inputs(prompt_of(0, 30), 40), client_timeout=PATIENCE_S)


def test_more_positions_than_were_learned_are_refused_when_the_server_starts(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    checkpoint = write_checkpoint(config, tmp_path / "model")
    add_model(tmp_path / "repository", "gpt2", checkpoint, max_seq_len="33")
    with (
        pytest.raises(CheckFailedError, match="'max_seq_len' is 33, the model has learned 32 positions"),
        running_server(tmp_path / "repository"),
    ):
        pass
