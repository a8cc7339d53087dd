"""An independent witness: NVIDIA ModelOpt exports the same saved models to the same format, on the CPU.

Both checkpoints must agree in every file, tensor (name, shape, dtype, bits) and config key, but for the rows of
`ALLOWED`. A row says when its difference must be there, so one that has become stale fails as a new one does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trtkit import __version__, hf
from trtkit.config import CheckpointConfig
from trtkit.convert import conversion
from trtkit.convert.source import plan_conversion

# One worker makes all exports in one go; ModelOpt takes seconds to import.
pytestmark = [pytest.mark.peer, pytest.mark.xdist_group("peer")]

MODELOPT = "0.47.0"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mqa": {"num_key_value_heads": 1},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"head_dim": 32},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"architecture": "MistralForCausalLM"},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen2-tied-mqa": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 32},
    "qwen3-tied": {"architecture": "Qwen3ForCausalLM", "head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"architecture": "GemmaForCausalLM", "head_dim": 32},
    "gemma-mqa": {"architecture": "GemmaForCausalLM", "head_dim": 32, "num_key_value_heads": 1},
    "gemma2": {"architecture": "Gemma2ForCausalLM", "head_dim": 32, "layer_types": WINDOWS},
    "gemma3": {"architecture": "Gemma3ForCausalLM", "head_dim": 32, "layer_types": WINDOWS},
}
"""Config values of random models, beyond those of `_settings`."""

DECODER_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
"""Hugging Face class name -> ModelOpt's name for the family."""

SOURCE_DTYPES = {"float16": "bfloat16", "bfloat16": "float32"}
"""Dtype of the checkpoint -> of the model it is made from, so that both tools have to round."""

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
"""TP and PP sizes. ModelOpt refuses layers that PP does not divide."""


@dataclass(frozen=True)
class Case:
    """One model in one dtype and layout."""

    model: str
    dtype: str
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}-tp{self.tp}-pp{self.pp}"

    @property
    def settings(self) -> dict[str, Any]:
        return _settings(self.model)

    @property
    def architecture(self) -> str:
        return str(self.settings["architecture"])

    @property
    def family(self) -> str:
        """`llama`, `qwen` or `gemma`."""
        return DECODER_TYPES[self.architecture].rstrip("23")

    @property
    def last_ranks(self) -> list[int]:
        """The ranks of the last pipeline stage."""
        return [(self.pp - 1) * self.tp + rank for rank in range(self.tp)]


def _settings(model: str) -> dict[str, Any]:
    return {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 131,  # odd, so that TP has to pad it
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": model.startswith("gemma"),  # as every published Gemma
        **MODELS[model],
    }


CASES = [Case(model, dtype, tp, pp) for model in MODELS for dtype in SOURCE_DTYPES for tp, pp in LAYOUTS]

ABSENT, ANY = "absent", "any value"


@dataclass(frozen=True)
class Allowed:
    """A difference that is meant to be.

    Attributes:
        key: what differs, in the spelling of `differences`; `{last}` stands for each rank of the last stage.
        ours: trtkit's value, `ABSENT` or `ANY`.
        theirs: ModelOpt's value, `ABSENT` or `ANY`.
        reason: why both are right, or why ours is.
        when: the cases in which it must be there.
    """

    key: str
    ours: Any
    theirs: Any
    reason: str
    when: Callable[[Case], bool] = field(default=lambda case: True)


def _scaled(case: Case) -> bool:
    return "rope_type" in case.settings.get("rope_parameters", {})


def _needs_stand_in(case: Case) -> bool:
    return case.architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")


ALLOWED = (
    Allowed("file conversion.json", ANY, ABSENT, "our manifest; TRT-LLM reads config.json and the ranks' files"),
    Allowed("file quant_cfg.json", ABSENT, ANY, "empty; TRT-LLM reads it with quant_algo MIXED_PRECISION only"),
    Allowed(
        "config producer", {"name": "trtkit", "version": __version__}, {"name": "modelopt", "version": MODELOPT},
        "who wrote it",
    ),
    Allowed(
        "config logits_dtype", "float32", "float16", "float32 is TRT-LLM's own default and loses nothing when sampling"
    ),
    *(
        Allowed(f"config {key}", ABSENT, ANY, "ModelOpt's own note; no TRT-LLM config class has such a key")
        for key in ("rank", "decoder", "rmsnorm", "lm_head_bias", "bias")
    ),
    Allowed("config rotary_pct", ABSENT, 1.0, "TRT-LLM's default, and these families rotate whole heads"),
    Allowed("config share_embedding_table", ABSENT, ANY, "TRT-LLM reads it up to 0.15; later it compares the tensors"),
    *(
        Allowed(f"config {key}", ANY, ABSENT, "left to TRT-LLM's config class, which is not installed here")
        for key in ("attn_bias", "mlp_bias", "tie_word_embeddings")
    ),
    Allowed(
        "config disable_weight_only_quant_plugin", False, ABSENT, "as above; GemmaConfig has no such key",
        lambda case: case.family != "gemma",
    ),
    Allowed(
        "config rotary_scaling", None, ABSENT, "no scaling: both mean TRT-LLM's default", lambda case: not _scaled(case)
    ),
    Allowed(
        "config rotary_scaling",
        {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"} | {"type": "llama3"},
        {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
        "ours adds the older spelling of rope_type for older releases",
        _scaled,
    ),
    *(
        Allowed(
            f"config {key}", value, ABSENT, "left to TRT-LLM's QWenConfig, which writes this value",
            lambda case: case.family == "qwen",
        )
        for key, value in {"qwen_type": ANY, "seq_length": 8192, "use_logn_attn": False}.items()
    ),
    Allowed(
        "config residual_mlp", ABSENT, False, "a key of TRT-LLM's LLaMAConfig only",
        lambda case: case.family != "llama",
    ),
    Allowed(
        "config hidden_act", "gelu_pytorch_tanh", "gelu",
        "ModelOpt takes the name of the wrapped function, and so loses that it is the tanh approximation",
        _needs_stand_in,
    ),
    *(
        Allowed(
            f"config {key}", ANY, ABSENT, "left to TRT-LLM's GemmaConfig, which the stand-in does not imitate",
            _needs_stand_in,
        )
        for key in ("rotary_base", "query_pre_attn_scalar", "final_logit_softcapping", "sliding_window")
    ),
    *(
        Allowed(
            f"config {key}", ANY, ABSENT, "as above, Gemma 2's own",
            lambda case: case.architecture == "Gemma2ForCausalLM",
        )
        for key in ("attn_logit_softcapping", "sliding_window_layers")
    ),
    *(
        Allowed(
            f"config {key}", value, ABSENT, "as above, Gemma 3's own; releases differ in how they spell the pattern",
            lambda case: case.architecture == "Gemma3ForCausalLM",
        )
        for key, value in {
            "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2, "_sliding_window_pattern": 2,
        }.items()
    ),
    Allowed(
        "config inter_layernorms", ANY, ABSENT, "left to TRT-LLM's GemmaConfig, which is not installed here",
        lambda case: case.family == "gemma",
    ),
    Allowed(
        "config sliding_window", 4096, ABSENT, "a note for whoever sets max_attention_window_size",
        lambda case: case.architecture == "MistralForCausalLM",
    ),
    Allowed(
        "rank{last} lm_head.weight", ANY, ABSENT,
        "ModelOpt leaves Gemma's tied head to TRT-LLM, which with TP or PP does not find it",
        lambda case: case.family == "gemma",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources (`source-{model}-{dtype}`) and ModelOpt's exports (named like cases)."""
    folder = tmp_path_factory.mktemp("modelopt")
    jobs = [
        {
            "source": str(folder / f"source-{model}-{dtype}"),
            "model": _settings(model),
            "decoder_type": DECODER_TYPES[_settings(model)["architecture"]],
            "dtype": source_dtype,
            "exports": [
                {"out": str(folder / str(case)), "dtype": dtype, "tp": case.tp, "pp": case.pp}
                for case in CASES
                if (case.model, case.dtype) == (model, dtype)
            ],
        }
        for model in MODELS
        for dtype, source_dtype in SOURCE_DTYPES.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("modelopt_export.py")), str(folder / "jobs.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, f"needs the extra `peer`; or leave out with -m 'not peer'\n{done.stderr[-3000:]}"
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conversion_equals_modelopt_export(case: Case, exports: Path, tmp_path: Path) -> None:
    convert(case, exports, tmp_path / "ours")
    found = differences(tmp_path / "ours", exports / str(case))
    expected = {row.key.format(last=rank): row for row in ALLOWED if row.when(case) for rank in case.last_ranks}
    unexpected = {key: values for key, values in found.items() if key not in expected}
    stale = sorted(expected.keys() - found.keys())
    assert not unexpected
    assert not stale
    for key, row in expected.items():
        for value, allowed in zip(found[key], (row.ours, row.theirs), strict=True):
            assert value == allowed or (allowed == ANY and value != ABSENT), (key, row.reason)


@pytest.mark.parametrize("case", [case for case in CASES if case.family == "gemma"], ids=str)
def test_head_that_modelopt_leaves_out_is_its_embedding(case: Case, exports: Path, tmp_path: Path) -> None:
    """What a row of `ALLOWED` hides is compared with the tensor that TRT-LLM would share."""
    convert(case, exports, tmp_path / "ours")
    for tp_rank, rank in enumerate(case.last_ranks):
        head = read(tmp_path / "ours", rank)["lm_head.weight"]
        embedding = read(exports / str(case), tp_rank)["transformer.vocab_embedding.weight"]
        assert same_bits(head, embedding)


def test_no_row_is_for_nothing() -> None:
    assert all(any(row.when(case) for case in CASES) for row in ALLOWED)


def convert(case: Case, exports: Path, out: Path) -> None:
    # ModelOpt always splits the embedding along the vocabulary.
    options = CheckpointConfig(tp=case.tp, pp=case.pp, dtype=case.dtype, parallel_embedding="vocab")  # type: ignore[arg-type]
    source = hf.open_source(exports / f"source-{case.model}-{case.dtype}")
    conversion.convert(plan_conversion(source, options), source, out)


def differences(ours: Path, theirs: Path) -> dict[str, tuple[Any, Any]]:
    """What differs between two checkpoints -> both values: files, config keys, tensors of each rank."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, *files in both(*({path.name: path for path in folder.iterdir()} for folder in (ours, theirs))):
        if ABSENT in files:
            found[f"file {name}"] = (files[0], files[1])
    for name, *values in both(*(json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))):
        if values[0] != values[1]:
            found[f"config {name}"] = (values[0], values[1])
    for rank in range(len(list(ours.glob("rank*.safetensors")))):
        for name, mine, other in both(read(ours, rank), read(theirs, rank)):
            if mine is ABSENT or other is ABSENT or not same_bits(mine, other):
                found[f"rank{rank} {name}"] = (describe(mine), describe(other))
    return found


def both(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(ours.keys() | theirs.keys()):
        yield name, ours.get(name, ABSENT), theirs.get(name, ABSENT)


def read(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / f"rank{rank}.safetensors")


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    )


def describe(tensor: Any) -> Any:
    return tensor if tensor is ABSENT else f"{tensor.dtype} {list(tensor.shape)}, sum {tensor.double().sum():.6g}"
