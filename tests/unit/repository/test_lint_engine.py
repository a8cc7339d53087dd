"""What the linter says about the engine or checkpoint behind a model, and about the tokenizer beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lint_faults import edit
from tokenizers import Tokenizer, models, processors

from trtkit.findings import Finding
from trtkit.repository.lint import Server, lint_repository

Parameters = dict[str, str]
BUILD: dict[str, Any] = {
    "max_batch_size": 8, "max_beam_width": 2, "max_seq_len": 2048, "max_input_len": 1024, "max_num_tokens": 4096,
    "plugin_config": {"use_paged_context_fmha": True},
}  # fmt: skip


def write_engine(folder: Path, *, version: str = "1.2.1", tp: int = 2, vocab_size: int = 100, **build: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pretrained = {"mapping": {"world_size": tp, "tp_size": tp}, "vocab_size": vocab_size}
    config = {"version": version, "pretrained_config": pretrained, "build_config": BUILD | build}
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(tp):
        (folder / f"rank{rank}.engine").write_bytes(b"1")
    return folder


def write_model(repository: Path, name: str, text: str, parameters: Parameters, code: str = "") -> Path:
    """A model with text parameters; a python model when it has code."""
    folder = repository / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}' for k, v in parameters.items()]
    (folder.parent / "config.pbtxt").write_text("\n".join([text, *entries, ""]))
    if code:
        (folder / "model.py").write_text(code)
    return folder


LLM = (
    'backend: "tensorrtllm"\nmax_batch_size: 8\ninput { name: "input_ids" data_type: TYPE_INT32 dims: -1 }\n'
    'output { name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] }'
)
PYTHON = LLM.replace("tensorrtllm", "python")
CLASS = "class TritonPythonModel:\n    pass\n"


def found(repository: Path, server: Server | None = None, engine: Path | None = None) -> dict[str, Finding]:
    return {item.id: item for item in lint_repository(repository, server=server or Server(), engine_dir=engine)}


# rule, parameters of the model, what the engine is, what is known about the server
ENGINES: list[tuple[str, Parameters, dict[str, Any], Server]] = [
    ("", {"max_beam_width": "2", "gpu_device_ids": "0,1;2,3", "enable_kv_cache_reuse": "true"}, {}, Server()),
    ("TK201", {}, {"max_batch_size": 4}, Server()),
    ("TK202", {"max_beam_width": "3"}, {}, Server()),
    ("TK203", {"gpu_device_ids": "0"}, {}, Server()),
    ("TK203", {"participant_ids": "0,1,2,3"}, {}, Server()),
    ("", {"participant_ids": "0,1,2"}, {}, Server()),
    ("TK203", {}, {}, Server(gpus=1)),
    ("", {"num_nodes": "2"}, {}, Server(gpus=1)),
    ("TK204", {}, {"version": "1.1.0"}, Server(release="26.07")),
    ("TK204", {}, {"version": "0.1.0"}, Server(release="26.07")),
    ("", {}, {"version": "1.1.0"}, Server(release="25.12")),
    ("TK205", {"max_tokens_in_paged_kv_cache": "1000"}, {}, Server()),
    ("TK205", {"max_attention_window_size": "1024,4096"}, {}, Server()),
    ("TK205", {}, {"max_num_tokens": 512}, Server()),
    ("", {"enable_chunked_context": "true"}, {"max_num_tokens": 512}, Server()),
    ("TK206", {"enable_chunked_context": "true"}, {"plugin_config": {"use_paged_context_fmha": False}}, Server()),
    ("TK206", {"enable_kv_cache_reuse": "true"}, {"plugin_config": {"use_paged_context_fmha": False}}, Server()),
    ("", {"enable_kv_cache_reuse": "false"}, {"plugin_config": {"use_paged_context_fmha": False}}, Server()),
    ("TK134", {"decoding_mode": "best"}, {}, Server()),
    ("TK134", {"lora_cache_gpu_memory_fraction": "two"}, {}, Server()),
    ("TK134", {"max_beam_width": "0"}, {}, Server()),
    ("TK140", {"max_beam_widht": "2"}, {}, Server()),
    ("TK140", {"cuda_graph_mode": "true"}, {"version": "0.12.0"}, Server(release="24.08")),
]


@pytest.mark.parametrize(("rule", "parameters", "engine", "server"), ENGINES)
def test_engines(tmp_path: Path, rule: str, parameters: Parameters, engine: dict[str, Any], server: Server) -> None:
    folder = write_engine(tmp_path / "engine", **engine)
    write_model(tmp_path / "models", "llm", LLM, {"gpt_model_path": str(folder), **parameters})
    assert set(found(tmp_path / "models", server)) == ({rule} if rule else set())


def test_an_engine_elsewhere_is_given_apart(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", max_batch_size=4)
    write_model(tmp_path / "models", "llm", LLM, {"gpt_model_path": "/models/engine"})
    assert set(found(tmp_path / "models")) == {"TK131"}
    assert set(found(tmp_path / "models", engine=engine)) == {"TK131", "TK201"}


def test_a_release_without_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtkit import releases

    future = replace(releases.load()[0], tag="27.01", tensorrt_llm="1.3.0")
    monkeypatch.setattr(releases, "load", lambda: (future,))
    folder = write_engine(tmp_path / "engine", version="1.3.0")
    write_model(tmp_path / "models", "llm", LLM, {"gpt_model_path": str(folder)})
    assert set(found(tmp_path / "models", Server(release="27.01"))) == {"TK207"}


def test_positions_of_a_checkpoint(tmp_path: Path) -> None:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = dict.fromkeys((*sizes, "head_size", "intermediate_size", "max_position_embeddings"), 4)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "rank0.safetensors").write_bytes(b"")
    text = json.dumps({"architecture": "LlamaForCausalLM", "dtype": "float16", **config, "mapping": {}})
    (checkpoint / "config.json").write_text(text)
    write_model(tmp_path / "m", "llm", PYTHON, {"checkpoint_dir": str(checkpoint), "max_seq_len": "5"}, CLASS)
    assert set(found(tmp_path / "m")) == {"TK205"}


def write_tokenizer(
    folder: Path,
    *,
    size: int = 10,
    template: str | None = None,
    generation: object = None,
    bos: object = "<s>",
    more: list[str] | None = None,
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, size)}}, unk_token="<s>"))  # noqa: S106
    tokenizer.add_special_tokens(more or [])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "chat_template": template}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


MESSAGES = '\ninput { name: "messages" data_type: TYPE_STRING dims: 1 }'
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"

# rule, config, parameters, the tokenizer
TOKENIZERS: list[tuple[str, str, Parameters, dict[str, Any]]] = [
    ("", PYTHON, {"vocab_size": "10"}, {}),
    ("TK211", PYTHON, {"vocab_size": "9"}, {}),
    ("", PYTHON, {"end_ids": "1, 2"}, {"generation": {"eos_token_id": [1, 2]}}),
    ("TK212", PYTHON, {"end_ids": "1"}, {"generation": {"eos_token_id": [1, 2]}}),
    ("TK212", PYTHON, {"end_ids": "1"}, {"generation": {"eos_token_id": 2}}),
    ("", PYTHON, {"end_ids": "1"}, {"generation": []}),
    ("", PYTHON + MESSAGES, {}, {"template": TEMPLATE}),
    ("TK213", PYTHON + MESSAGES, {}, {}),
    ("", PYTHON + MESSAGES.replace("dims: 1", "dims: 1 optional: true"), {}, {}),
    ("TK213", PYTHON + MESSAGES.replace("dims: 1", "dims: 1 optional: true"), {}, {"more": ["<|im_start|>"]}),
    ("TK214", PYTHON, {"add_special_tokens": "true"}, {"template": TEMPLATE}),
    ("TK214", PYTHON, {"add_special_tokens": "true"}, {"template": TEMPLATE, "bos": {"content": "<s>"}}),
    ("TK214", PYTHON, {"add_special_tokens": "true"}, {"template": "<s>{{ messages[0].content }}"}),
    ("", PYTHON, {"add_special_tokens": "false"}, {"template": TEMPLATE}),
    ("", PYTHON, {"add_special_tokens": "true"}, {"template": "{{ messages[0].content }}"}),
]


@pytest.mark.parametrize(("rule", "config", "parameters", "tokenizer"), TOKENIZERS)
def test_tokenizers(tmp_path: Path, rule: str, config: str, parameters: Parameters, tokenizer: dict[str, Any]) -> None:
    folder = write_model(tmp_path, "pre", config, {"tokenizer_dir": "tokenizer", **parameters}, CLASS)
    write_tokenizer(folder / "tokenizer", **tokenizer)
    assert set(found(tmp_path)) == ({rule} if rule else set())


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path, file: str) -> None:
    folder = write_model(tmp_path, "pre", PYTHON + MESSAGES, {"tokenizer_dir": "tokenizer"}, CLASS)
    write_tokenizer(folder / "tokenizer")
    text = TEMPLATE if file.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (folder / "tokenizer" / file).write_text(text)
    assert found(tmp_path) == {}


def test_a_tokenizer_that_is_larger_than_the_engines_vocabulary(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", vocab_size=9)
    write_model(tmp_path / "models", "llm", LLM, {"gpt_model_path": str(engine)})
    folder = write_model(tmp_path / "models", "pre", PYTHON, {"tokenizer_dir": "tokenizer"}, CLASS)
    write_tokenizer(folder / "tokenizer")
    (finding,) = lint_repository(tmp_path / "models")
    assert (finding.id, finding.place) == ("TK211", "pre/1/tokenizer/tokenizer.json")


def test_findings_name_the_line(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine")
    write_model(tmp_path / "m", "llm", LLM, {"gpt_model_path": str(engine), "max_beam_width": "2"})
    edit("llm", "max_batch_size: 8", "max_batch_size: 9")(tmp_path / "m")
    assert found(tmp_path / "m")["TK201"].place == "llm/config.pbtxt:2"
