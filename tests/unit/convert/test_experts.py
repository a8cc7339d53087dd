"""Mixtures of experts: which rank holds which part of which expert, told without the weight maps."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from trtkit import architectures, hf
from trtkit.checkpoint import open_checkpoint
from trtkit.config import CheckpointConfig
from trtkit.convert.cast import Array
from trtkit.convert.conversion import convert
from trtkit.convert.plan import PlannedTensor, plan_checkpoint
from trtkit.convert.readback import load_transformers_model
from trtkit.convert.source import checkpoint_config, plan_conversion
from trtkit.convert.verify import verify
from trtkit.errors import InputError

EXPERTS, WIDTH, HIDDEN, LAYERS = 4, 24, 32, 2
BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
QWEN = {**BASE, "intermediate_size": 40, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**BASE, "intermediate_size": WIDTH, "num_local_experts": EXPERTS},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**QWEN, "norm_topk_prob": True},
}
NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")} | dict.fromkeys(
    ("qwen2_moe", "qwen3_moe"), ("mlp", "gate_proj", "up_proj", "down_proj")
)
"""Where a family keeps its experts, and their activated half, other half and way back."""
ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}  # fmt: skip
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4)]


def make_model(model_type: str) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **FAMILIES[model_type])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a family's source: with a tensor per expert, or with all experts of a layer in one tensor."""

    @cache
    def make(model_type: str, *, stacked: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("sources") / model_type
        make_model(model_type).save_pretrained(folder, save_original_format=not stacked)
        return folder

    return make


def expected_blocks(
    source: dict[str, torch.Tensor], model_type: str, layer: int, rank: int, tp: int, ep: int
) -> dict[str, torch.Tensor]:
    """The tensors of one TP rank's mixture, by slicing: as tensorrt_llm/mapping.py numbers the ranks, with experts in
    consecutive blocks, the two halves of the gated MLP split on their own, the activated one below."""
    place, activated, other, back = NAMES[model_type]
    prefix = f"model.layers.{layer}.{place}."
    moe_tp, moe_tp_rank, moe_ep_rank = tp // ep, rank // ep, rank % ep
    mine = range(EXPERTS)[moe_ep_rank * EXPERTS // ep : (moe_ep_rank + 1) * EXPERTS // ep]
    rows = slice(moe_tp_rank * WIDTH // moe_tp, (moe_tp_rank + 1) * WIDTH // moe_tp)
    weights = {key: [source[f"{prefix}experts.{i}.{key}.weight"] for i in mine] for key in (activated, other, back)}
    blocks = {
        "router.weight": source[f"{prefix}gate.weight"].float(),
        "fc.weight": torch.stack(
            [torch.cat([up[rows], gate[rows]]) for up, gate in zip(weights[other], weights[activated], strict=True)]
        ),
        "proj.weight": torch.stack([down[:, rows] for down in weights[back]]),
    }
    if model_type == "qwen2_moe":
        shared = {key: source[f"{prefix}shared_expert.{key}_proj.weight"] for key in ("gate", "up", "down")}
        blocks["shared_expert.fc.weight"] = torch.cat([shared[key].chunk(tp)[rank] for key in ("up", "gate")])
        blocks["shared_expert.proj.weight"] = shared["down"].chunk(tp, dim=1)[rank]
        blocks["shared_expert_gate.weight"] = source[f"{prefix}shared_expert_gate.weight"]
    return blocks


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_rank_holds_its_experts(
    model_type: str, tp: int, ep: int, pp: int, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(model_type)
    opened = hf.open_source(folder)
    convert(plan_conversion(opened, CheckpointConfig(tp=tp, pp=pp, ep=ep)), opened, tmp_path / "out")

    checkpoint = open_checkpoint(tmp_path / "out")
    mapping = checkpoint.config["mapping"]
    assert (mapping["moe_tp_size"], mapping["moe_ep_size"]) == (tp // ep, ep)
    assert verify(opened, checkpoint).passed

    source = safetensors.torch.load_file(folder / "model.safetensors")
    for stage in range(pp):
        for rank in range(tp):
            found = safetensors.torch.load_file(tmp_path / "out" / f"rank{stage * tp + rank}.safetensors")
            for local, layer in enumerate(range(LAYERS)[stage * LAYERS // pp : (stage + 1) * LAYERS // pp]):
                expected = {
                    f"transformer.layers.{local}.mlp.{name}": tensor
                    for name, tensor in expected_blocks(source, model_type, layer, rank, tp, ep).items()
                }
                assert {name for name in found if name.startswith(f"transformer.layers.{local}.mlp.")} == set(expected)
                for name, tensor in expected.items():
                    assert found[name].dtype == tensor.dtype, name
                    assert torch.equal(found[name], tensor), (stage, rank, name)


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_put_together_model_computes_the_same(
    model_type: str, tp: int, ep: int, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(model_type)
    opened = hf.open_source(folder)
    convert(plan_conversion(opened, CheckpointConfig(tp=tp, ep=ep, dtype="float32")), opened, tmp_path / "out")
    ids = torch.arange(2 * 20).reshape(2, 20) % 131
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = model(ids).logits
        found = load_transformers_model(tmp_path / "out")(ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stacked_experts_make_the_same_checkpoint(
    model_type: str, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folders = {"single": make_folder(model_type), "stacked": make_folder(model_type, stacked=True)}
    assert "model.layers.0.mlp.experts.gate_up_proj" in hf.open_source(folders["stacked"]).tensors
    for name, folder in folders.items():
        opened = hf.open_source(folder)
        convert(plan_conversion(opened, CheckpointConfig(tp=2, ep=2)), opened, tmp_path / name)
        assert verify(opened, open_checkpoint(tmp_path / name)).passed
    for rank in range(2):
        single, stacked = ((tmp_path / name / f"rank{rank}.safetensors").read_bytes() for name in folders)
        assert single == stacked


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_routing_comes_back(model_type: str, normalised: bool) -> None:
    """TRT-LLM's mode 1 is the softmax over the chosen experts, 0 their part of the softmax over all."""
    given = transformers.AutoConfig.for_model(model_type, **{**FAMILIES[model_type], "norm_topk_prob": normalised})
    architecture = architectures.get(ARCHITECTURES[model_type])
    hf_config = hf.normalize_config({**given.to_dict(), "architectures": [ARCHITECTURES[model_type]]})
    config = architecture.checkpoint_config(hf_config)
    assert config["moe"] == {"num_experts": EXPERTS, "top_k": 2, "normalization_mode": int(normalised)}
    settings = architecture.huggingface_config(config)
    restored = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    assert restored.norm_topk_prob is normalised
    assert (restored.num_experts, restored.num_experts_per_tok) == (EXPERTS, 2)


@pytest.mark.parametrize(
    ("model_type", "tp", "ep", "cause", "fix"),
    [
        ("mixtral", 3, 3, "EP 3 .* 3 groups do not divide its 4 experts", "valid EP sizes: 1, 2, 4$"),
        ("qwen3_moe", 8, 8, "EP 8 .* 8 groups do not divide its 4 experts", "valid EP sizes: 1, 2, 4$"),
        ("qwen2_moe", 2, 4, "TP 2 .* 4 expert-parallel groups do not divide it", "valid TP sizes .*: 4, 8$"),
        ("llama", 2, 2, "EP 2 .* no experts to spread", "valid EP sizes: 1$"),
    ],
)
def test_layouts_that_do_not_fit(model_type: str, tp: int, ep: int, cause: str, fix: str) -> None:
    config = {**FAMILIES.get(model_type, {**BASE, "intermediate_size": 48}), "hidden_act": "silu", "rms_norm_eps": 1e-6}
    with pytest.raises(InputError, match=cause) as error:
        planned(model_type, config, tp, ep)
    assert re.search(fix, error.value.fix)


def planned(model_type: str, config: dict[str, Any], tp: int, ep: int) -> Any:
    """The plan for a model of which there is only a config."""
    normal = hf.normalize_config({**config, "architectures": [ARCHITECTURES[model_type]]})
    source = hf.Source(Path("nowhere"), normal, {})
    return plan_checkpoint(checkpoint_config(source, CheckpointConfig(tp=tp, ep=ep, dtype="float32")))


def filled(tensor: PlannedTensor, sources: dict[str, Array]) -> Array:
    """A planned tensor's values; what no piece covers is NaN."""
    values = np.full(tensor.shape, np.nan)
    for piece in tensor.pieces:
        box = tuple(slice(start, stop) for start, stop in piece.box)
        values.reshape(-1)[piece.element : piece.element + piece.count] = (
            sources[piece.source].reshape(piece.view)[box].reshape(-1)
        )
    return values


@given(
    model_type=st.sampled_from(sorted(FAMILIES)),
    experts=st.integers(2, 12),
    width=st.integers(1, 24),
    tp=st.sampled_from([1, 2, 4, 8]),
    ep=st.integers(1, 12),
)
def test_experts_are_shared_out_whatever_their_number(
    model_type: str, experts: int, width: int, tp: int, ep: int
) -> None:
    """A layout is refused, or every element of every expert is on exactly one rank, where TRT-LLM looks for it."""
    count = {"num_local_experts" if model_type == "mixtral" else "num_experts": experts}
    sized = {"intermediate_size" if model_type == "mixtral" else "moe_intermediate_size": width}
    config = {**FAMILIES[model_type], **count, **sized, "hidden_act": "silu", "rms_norm_eps": 1e-6}
    fits = experts % ep == 0 and tp % ep == 0 and width % (tp // ep) == 0
    if not fits:
        with pytest.raises(InputError, match="does not fit this model"):
            planned(model_type, config, tp, ep)
        return
    plan = planned(model_type, config, tp, ep)

    place, activated, other, back = NAMES[model_type]
    generator = np.random.default_rng(0)
    sources = {name: generator.random(shape) for name, shape in plan.sources.items() if ".experts." in name}
    kinds = {
        kind: np.stack([sources[f"model.layers.1.{place}.experts.{i}.{kind}.weight"] for i in range(experts)])
        for kind in (activated, other, back)
    }
    shards: dict[str, list[Array]] = {"fc": [], "proj": []}
    for rank in plan.ranks:
        for kind, found in shards.items():
            tensor = next(t for t in rank if t.name == f"transformer.layers.1.mlp.{kind}.weight")
            found.append(filled(tensor, sources))

    def whole(kind: str, axis: int) -> Array:
        """All experts, from the ranks: those of one moe_tp_rank follow one another, blocks of experts within them."""
        rows = [np.concatenate(shards[kind][first : first + ep]) for first in range(0, tp, ep)]
        halves = [np.split(row, 2, axis=1) for row in rows] if kind == "fc" else [[row] for row in rows]
        return np.concatenate([np.concatenate(half, axis=axis) for half in zip(*halves, strict=True)], axis=1)

    assert np.array_equal(whole("fc", 1), np.concatenate([kinds[other], kinds[activated]], axis=1))
    assert np.array_equal(whole("proj", 2), kinds[back])
    held = [piece for rank in plan.ranks for tensor in rank for piece in tensor.pieces if piece.source in sources]
    assert sum(piece.count for piece in held) == sum(values.size for values in sources.values())
    assert all(piece.counted for piece in held)
