"""Every rule, by breaking a good repository once: exactly that rule speaks, with the file and the line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from lint_faults import append, both, edit, move, remove, write
from tokenizers import Tokenizer, decoders, models

from trtkit.config_file import parse_config
from trtkit.errors import InputError
from trtkit.findings import Finding
from trtkit.repository.generate import render_repository, write_repository
from trtkit.repository.lint import lint_repository
from trtkit.repository.lint.rules import RULES


@pytest.fixture
def repository(source: Path, tmp_path: Path) -> Path:
    """A repository without findings, for an engine of two ranks."""
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "config.json").write_text(engine_config({"world_size": 2, "tp_size": 2}))
    for rank in range(2):
        (engine / f"rank{rank}.engine").write_bytes(b"1")
    config = parse_config("name: t\nmodel: {source: x}\nserving: {max_batch_size: 8, preferred_batch_size: [4]}\n")
    out = tmp_path / "repository"
    write_repository(render_repository(config, tokenizer_dir=source, engine_dir=engine), out)
    return out


def engine_config(mapping: object) -> str:
    return json.dumps({"version": "1.2.1", "pretrained_config": {"mapping": mapping}, "build_config": {}})


@dataclass(frozen=True)
class Case:
    """One way to break the repository.

    Attributes:
        expected: the rule that must speak; several where one fault shows at two ends.
        place: what the finding's place must contain.
    """

    expected: str
    break_it: Callable[[Path], None]
    place: str = ""


def empty(repository: Path) -> None:
    for child in repository.iterdir():
        if child.is_dir():
            shutil.rmtree(child)


def word_pieces(repository: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.save(str(repository / "postprocessing/1/tokenizer/tokenizer.json"))


def as_reference(path: str) -> Callable[[Path], None]:
    """Makes the engine model a python model with its checkpoint at `path`."""

    def apply(repository: Path) -> None:
        edit(LLM, 'backend: "tensorrtllm"', 'backend: "python"')(repository)
        edit(LLM, r'(key: "gpt_model_path".*?string_value: )"[^"]*"', rf'\1"{path}"')(repository)
        edit(LLM, "gpt_model_path", "checkpoint_dir")(repository)
        write("tensorrt_llm/1/model.py", "class TritonPythonModel:\n    pass\n")(repository)

    return apply


def checkpoint_with(world_size: object) -> Callable[[Path], None]:
    """Puts a checkpoint without ranks beside the version folder of the engine model."""
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 4)
    sizes |= dict.fromkeys(("num_key_value_heads", "head_size", "intermediate_size", "max_position_embeddings"), 4)
    mapping = {"world_size": world_size, "tp_size": 2}
    config = {"architecture": "LlamaForCausalLM", "dtype": "float16", **sizes, "mapping": mapping}

    def apply(repository: Path) -> None:
        (repository / LLM / "checkpoint").mkdir()
        write(f"{LLM}/checkpoint/config.json", json.dumps(config))(repository)

    return apply


def insert(path: str, line: str) -> Callable[[Path], None]:
    """Adds a line of code below the file's `from __future__` import."""

    def apply(repository: Path) -> None:
        file = repository / path
        future = "from __future__ import annotations\n"
        assert future in file.read_text()
        file.write_text(file.read_text().replace(future, f"{future}{line}\n", 1))

    return apply


UNBATCHED = both(
    edit("preprocessing", "max_batch_size: 8", "max_batch_size: 0"),
    edit("preprocessing", "  preferred_batch_size: 4\n", ""),
    remove("ensemble"),
)
PRE, POST, LLM, ENS = "preprocessing", "postprocessing", "tensorrt_llm", "ensemble"
SPLIT = '\noutput { name: "x" data_type: TYPE_INT32 dims: -1 }\n'

CASES = [
    Case("TK101", empty),
    Case("TK102", both(remove("postprocessing/config.pbtxt"), remove("ensemble")), "postprocessing"),
    Case("TK103", edit(POST, "max_batch_size: 8", "max_batch_size: ${size}"), "postprocessing/config.pbtxt:3"),
    Case("TK103", edit(POST, "TYPE_INT32", "TYPE_FLOAT"), "postprocessing/config.pbtxt:6"),
    Case("TK103", append(PRE, "instance_groups { }"), "preprocessing/config.pbtxt:"),
    Case("TK103", append(ENS, "dynamic_batching { }"), "ensemble/config.pbtxt:"),
    Case("TK104", edit(LLM, "guaranteed_no_evict", "${policy}"), "tensorrt_llm/config.pbtxt:"),
    Case("TK105", edit(PRE, 'name: "preprocessing"', 'name: "tokenizer"'), "preprocessing/config.pbtxt:2"),
    Case("TK106", both(remove("tensorrt_llm/1")), "tensorrt_llm"),
    Case("TK106", move("tensorrt_llm/1", "tensorrt_llm/v1"), "tensorrt_llm"),
    Case("TK106", append(PRE, "version_policy { specific { versions: 3 } }"), "preprocessing/config.pbtxt:"),
    Case("TK107", remove("preprocessing/1/model.py"), "preprocessing/1/model.py"),
    Case("TK108", write("preprocessing/1/model.py", "x = 1\ndef f(:\n"), "preprocessing/1/model.py:2"),
    Case("TK109", edit(LLM, 'backend: "tensorrtllm"', 'platform: "tensorrt_llm"'), "tensorrt_llm/config.pbtxt:"),
    Case("TK110", edit(PRE, 'backend: "python"\n', ""), "preprocessing/config.pbtxt"),
    Case("TK120", edit(LLM, 'backend: "tensorrtllm"\n', ""), "tensorrt_llm/config.pbtxt"),
    Case("TK111", both(edit(PRE, "max_batch_size: 8", "max_batch_size: -1")), "preprocessing/config.pbtxt:3"),
    Case("TK112", edit(PRE, "preferred_batch_size: 4", "preferred_batch_size: 9"), "preprocessing/config.pbtxt:"),
    Case("TK112", edit(PRE, "preferred_batch_size: 4", "preferred_batch_size: 0"), "preprocessing/config.pbtxt:"),
    Case("TK113", UNBATCHED, "preprocessing/config.pbtxt:"),
    Case(
        "TK114",
        both(
            UNBATCHED,
            edit(PRE, r"dynamic_batching \{.*?\n\}\n", ""),
            edit(PRE, r"(name: \"QUERY\")", r"\1 allow_ragged_batch: true"),
        ),
        "preprocessing/config.pbtxt:5",
    ),
    Case("TK115", edit(PRE, "kind: KIND_CPU", "kind: KIND_CPU gpus: 0"), "preprocessing/config.pbtxt:"),
    Case(
        "TK116",
        edit(PRE, r"dynamic_batching \{", "dynamic_batching { priority_levels: 2 default_priority_level: 1"),
        "preprocessing",
    ),
    Case(
        "TK117",
        edit(PRE, r"dynamic_batching \{", "dynamic_batching { priority_levels: 2 default_priority_level: 3"),
        "preprocessing",
    ),
    Case("TK118", append(LLM, "response_cache { enable: true }"), "tensorrt_llm/config.pbtxt:"),
    Case("TK119", edit(LLM, r"dynamic_batching \{", "dynamic_batching { preserve_ordering: true"), "tensorrt_llm"),
    Case("TK119", edit(LLM, r"dynamic_batching \{.*?\n\}\n", "sequence_batching { }\n"), "tensorrt_llm"),
    Case("TK121", append(PRE, 'input { name: "x" data_type: TYPE_INT32 dims: 0 optional: true }'), "preprocessing"),
    Case("TK121", append(PRE, 'input { name: "x" data_type: TYPE_INT32 optional: true }'), "preprocessing"),
    Case("TK121", append(PRE, 'output { name: "x" dims: 1 }'), "preprocessing"),
    Case("TK121", append(PRE, "output { data_type: TYPE_INT32 dims: 1 }"), "preprocessing"),
    Case("TK122", append(ENS, 'output { name: "text_output" data_type: TYPE_STRING dims: -1 }'), "ensemble"),
    Case("TK123", edit(LLM, r"reshape \{\n  \}", "reshape { shape: [ 2 ] }"), "tensorrt_llm/config.pbtxt:"),
    Case(
        "TK123",
        append(PRE, 'output { name: "x" data_type: TYPE_INT32 dims: -1 reshape { shape: 3 } }'),
        "preprocessing",
    ),
    Case(
        "TK124",
        append(
            PRE,
            'model_warmup { name: "w" batch_size: 1 inputs { key: "NOPE" value { data_type: TYPE_INT32 dims: 1 '
            "zero_data: true } } }",
        ),
        "preprocessing/config.pbtxt:",
    ),
    Case("TK125", write("preprocessing/1/model.py", ""), "preprocessing/1/model.py"),
    Case("TK125", write("preprocessing/1/model.py", "class Model:\n    pass\n"), "preprocessing/1/model.py"),
    Case("TK126", remove("preprocessing/1/serving"), "preprocessing/1/model.py:"),
    Case("TK126", remove("postprocessing/1/serving"), "postprocessing/1/model.py:"),
    Case("TK126", remove("postprocessing/1/serving/keyed.py"), "postprocessing/1/model.py:"),
    Case("TK127", insert("preprocessing/1/model.py", "import no_such_module_here.part"), "preprocessing/1/model.py:"),
    Case("TK131", as_reference("/nowhere/checkpoint"), "tensorrt_llm/config.pbtxt:"),
    Case("TK137", as_reference("/nowhere/modèles/checkpoint"), "tensorrt_llm/config.pbtxt:"),
    Case("TK137", edit(PRE, 'string_value: "tokenizer"', 'string_value: "/nowhere/ü"'), "preprocessing/config.pbtxt:"),
    Case("TK138", as_reference("../absent"), "tensorrt_llm/config.pbtxt:"),
    Case(
        "TK131",
        edit(LLM, r'string_value: "[^"]*/engine"', 'string_value: "/nowhere/engine"'),
        "tensorrt_llm/config.pbtxt:",
    ),
    Case("TK132", remove("postprocessing/1/tokenizer"), "postprocessing/1/tokenizer/tokenizer.json"),
    Case("TK133", remove("../engine/rank1.engine"), "rank1.engine"),
    Case("TK133", remove("../engine/config.json"), "config.json"),
    Case("TK133", write("../engine/rank0.engine", ""), "rank0.engine"),
    Case("TK133", write("../engine/config.json", engine_config({"tp_size": [2]})), "engine/config.json"),
    Case("TK133", write("../engine/config.json", engine_config([2])), "engine/config.json"),
    Case("TK133", write("../engine/config.json", "[" * 100_000), "engine/config.json"),
    Case("TK133", both(checkpoint_with([2]), as_reference("../checkpoint")), "checkpoint/config.json"),
    Case("TK133", both(checkpoint_with({"a": 1}), as_reference("../checkpoint")), "checkpoint/config.json"),
    Case("TK133", both(checkpoint_with(2), as_reference("../checkpoint")), "rank0.safetensors"),
    Case("TK134", edit(LLM, "inflight_fused_batching", "inflight"), "tensorrt_llm/config.pbtxt:"),
    Case("TK134", edit(LLM, "guaranteed_no_evict", "no_evict"), "tensorrt_llm/config.pbtxt:"),
    Case("TK134", edit(LLM, 'string_value: "0.9"', 'string_value: "1.5"'), "tensorrt_llm/config.pbtxt:"),
    Case("TK135", write("preprocessing/1/tokenizer/tokenizer.json", "{}"), "preprocessing/1/tokenizer/tokenizer.json"),
    Case("TK136", word_pieces, "postprocessing/1/tokenizer/tokenizer.json"),
    Case("TK141", edit(ENS, 'model_name: "postprocessing"', 'model_name: "detokenizer"'), "ensemble/config.pbtxt:"),
    Case("TK142", edit(ENS, 'key: "seed"', 'key: "random_seed"'), "ensemble/config.pbtxt:"),
    Case("TK142", edit(ENS, 'key: "sequence_length"', 'key: "lengths"'), "ensemble/config.pbtxt:"),
    Case(
        "TK143",
        both(
            edit(LLM, r'(name: "seed".*?)  optional: true\n', r"\1"),
            edit(ENS, r'    input_map \{\n      key: "seed".*?\n    \}\n', ""),
            edit(ENS, r'input \{\n  name: "seed".*?\n\}\n', ""),
        ),
        "ensemble/config.pbtxt:",
    ),
    Case("TK144", append(ENS, 'output { name: "finish" data_type: TYPE_STRING dims: 1 }'), "ensemble/config.pbtxt:"),
    Case(
        "TK145",
        append(ENS, 'input { name: "typo" data_type: TYPE_INT32 dims: 1 optional: true }'),
        "ensemble/config.pbtxt:",
    ),
    Case(
        "TK146",
        both(edit(ENS, r'value: "seed"', 'value: "sead"'), edit(ENS, r'input \{\n  name: "seed".*?\n\}\n', "")),
        "ensemble",
    ),
    Case(
        "TK147",
        edit(
            ENS,
            r'(    output_map \{\n      key: "output_ids")',
            r'    output_map { key: "context_logits" value: "_x" }\n\1',
        ),
        "ensemble",
    ),
    Case("TK148", edit(ENS, r'(name: "top_p"\n  data_type: )TYPE_FP32', r"\1TYPE_FP64"), "ensemble/config.pbtxt:"),
    Case(
        "TK149", edit(ENS, r'(name: "top_k"\n  data_type: TYPE_INT32\n  dims: )1', r"\g<1>2"), "ensemble/config.pbtxt:"
    ),
    Case("TK150", edit(ENS, "max_batch_size: 8", "max_batch_size: 16"), "ensemble/config.pbtxt:4"),
    Case(
        "TK151",
        both(
            edit(ENS, r'(key: "END_ID"\n      value: )"end_id"', r'\1"_SEQUENCE_LENGTH"'),
            edit(ENS, r'input \{\n  name: "end_id".*?\n\}\n', ""),
        ),
        "ensemble",
    ),
    Case("TK152", append(ENS, "instance_group { count: 1 kind: KIND_CPU }"), "ensemble/config.pbtxt:"),
    Case("TK152", append(ENS, 'backend: "python"'), "ensemble/config.pbtxt:"),
    Case("TK152", append(ENS, "optimization { priority: PRIORITY_MAX }"), "ensemble/config.pbtxt:"),
    Case("TK153", edit(POST, "count: 1", "count: 2"), "postprocessing/config.pbtxt"),
    Case(
        "TK154",
        both(
            edit(ENS, r'(key: "SEQUENCE_LENGTH"\n      value: )"_SEQUENCE_LENGTH"', r'\1"_REQUEST_INPUT_LEN"'),
            edit(ENS, r'    output_map \{\n      key: "sequence_length".*?\n    \}\n', ""),
        ),
        "ensemble/config.pbtxt:",
    ),
    Case(
        "TK154",
        both(
            edit(ENS, r'"_PREPROCESSOR_PAD_ID"', '"pad_used"', count=9),
            append(ENS, 'output { name: "pad_used" data_type: TYPE_INT32 dims: 1 }'),
        ),
        "ensemble/config.pbtxt:",
    ),
    Case("TK155", edit(ENS, "model_version: -1", "model_version: 7"), "ensemble/config.pbtxt:"),
    Case("TK156", append(PRE, 'output { name: "INPUT_ID" data_type: TYPE_INT32 dims: -1 }'), "ensemble"),
    Case(
        "TK156",
        edit(ENS, '"_PREPROCESSOR_END_ID"', '"_PREPROCESSOR_PAD_ID"', count=9),
        "ensemble",
    ),
]
# One fault, two findings that are both true: these may come along.
ALONG = {"TK117": {"TK116"}, "TK124": {"TK173"}, "TK137": {"TK185"}, "TK156": {"TK122", "TK144"}}


def describe(case: Case) -> str:
    return case.expected


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_each_fault_is_found_and_nothing_else(repository: Path, case: Case) -> None:
    assert lint_repository(repository) == []
    case.break_it(repository)
    findings = lint_repository(repository)
    found = {finding.id for finding in findings}
    assert case.expected in found
    assert found <= {case.expected} | ALONG.get(case.expected, set()), findings
    first = next(finding for finding in findings if finding.id == case.expected)
    assert case.place in first.place
    assert first.severity == RULES[case.expected].severity
    assert first.cause
    assert first.fix
    assert "\n" not in first.cause + first.fix + first.place


def test_the_line_is_the_line_of_the_fault(repository: Path) -> None:
    edit(ENS, 'key: "seed"', 'key: "random_seed"')(repository)
    finding = next(f for f in lint_repository(repository) if f.id == "TK142")
    number = int(finding.place.rsplit(":", 1)[1])
    assert "random_seed" in (repository / "ensemble/config.pbtxt").read_text().splitlines()[number - 1]


@pytest.mark.parametrize(
    "code",
    [
        "class Other: pass\nTritonPythonModel = Other\n",
        "from beside import TritonPythonModel\n",
        "from beside import *\n",
        "try:\n    import no_such_module_here\nexcept ImportError:\n    pass\nclass TritonPythonModel: pass\n",
        "import json, os.path, triton_python_backend_utils\nclass TritonPythonModel: pass\n",
    ],
)
def test_code_that_is_fine(repository: Path, code: str) -> None:
    write("preprocessing/1/beside.py", "class TritonPythonModel: pass\n")(repository)
    write("preprocessing/1/model.py", code)(repository)
    assert lint_repository(repository) == []


def test_a_packed_environment_may_hold_any_module(repository: Path) -> None:
    insert("preprocessing/1/model.py", "import no_such_module_here")(repository)
    append(PRE, 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/env.tar.gz" } }')(repository)
    assert [finding.id for finding in lint_repository(repository)] == ["TK139"]  # the environment is not here


@pytest.mark.parametrize("name", ["__pycache__", ".git"])
def test_folders_that_are_no_models(repository: Path, name: str) -> None:
    (repository / name).mkdir()
    assert lint_repository(repository) == []


def test_the_backend_in_cpp_reads_any_path(repository: Path) -> None:
    edit(LLM, r'string_value: "[^"]*/engine"', 'string_value: "/nowhere/modèle"')(repository)
    assert [finding.id for finding in lint_repository(repository)] == ["TK131"]


def test_a_comment_may_hold_a_placeholder(repository: Path) -> None:
    append(LLM, "\n# filled in from ${policy}\n")(repository)
    assert lint_repository(repository) == []


def test_a_model_that_cannot_be_read_hides_no_other_fault(repository: Path) -> None:
    edit(PRE, "max_batch_size: 8", "max_batch_size: ${size}")(repository)
    edit(POST, "count: 1", "count: 2")(repository)
    assert [finding.id for finding in lint_repository(repository)] == ["TK103", "TK153"]


def test_a_decoupled_ensemble_inside_an_ensemble_counts_as_decoupled(repository: Path) -> None:
    """A step behind an inner ensemble that streams needs one instance as much as one behind the LLM itself."""
    models = {
        "after": 'name: "after" backend: "tensorrtllm" max_batch_size: 8 instance_group { count: 2 kind: KIND_CPU }\n'
        'input { name: "T" data_type: TYPE_STRING dims: -1 } output { name: "U" data_type: TYPE_STRING dims: -1 }',
        "outer": 'name: "outer" platform: "ensemble" max_batch_size: 8\n'
        'input { name: "p" data_type: TYPE_STRING dims: 1 } input { name: "m" data_type: TYPE_INT32 dims: 1 }\n'
        'output { name: "u" data_type: TYPE_STRING dims: -1 }\nensemble_scheduling {\n'
        'step { model_name: "ensemble" model_version: -1 input_map { key: "text_input" value: "p" }\n'
        'input_map { key: "max_tokens" value: "m" } output_map { key: "text_output" value: "t" } }\n'
        'step { model_name: "after" model_version: -1 input_map { key: "T" value: "t" }\n'
        'output_map { key: "U" value: "u" } } }',
    }
    for name, text in models.items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(text)
    assert [finding.id for finding in lint_repository(repository)] == ["TK153"]


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        lint_repository(tmp_path / "nowhere")


def test_findings_are_plain_data(repository: Path) -> None:
    edit(POST, "count: 1", "count: 2")(repository)
    (finding,) = lint_repository(repository)
    assert isinstance(finding, Finding)
    assert json.loads(json.dumps(finding.to_dict()))["id"] == "TK153"
