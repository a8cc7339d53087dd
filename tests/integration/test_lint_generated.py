"""Faults in a generated repository: the linter finds each, and a real Triton server refuses each."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from test_repository_server import generated, write_tokenizer
from triton_process import serve

from trtkit.findings import has_errors
from trtkit.repository.generate import write_repository
from trtkit.repository.lint import lint_repository

# Ways to break a repository, which tests without a server use too.
sys.path.append(str(Path(__file__).parents[1] / "unit" / "repository"))
from lint_cases import EMBEDDED
from lint_faults import Fault, append, both, edit

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("repository_server")]


def drop_ensemble_input(name: str) -> Fault:
    return edit("ensemble", rf'input \{{\n  name: "{name}".*?\n\}}\n', "")


PRE, POST, LLM, ENS = "preprocessing", "postprocessing", "tensorrt_llm", "ensemble"
SEED_INPUT = r'    input_map \{\n      key: "seed".*?\n    \}\n'
EXTRA_OUTPUT = 'output { name: "EXTRA" data_type: TYPE_INT32 dims: 1 }'

# rule, what the server says (in its answer or, for what it calls a failed poll, in its log), and the fault
REFUSED: list[tuple[str, str, Fault]] = [
    ("TK103", "failed to read text proto", edit(POST, "max_batch_size: 8", "max_batch_size: ${size}")),
    ("TK103", "failed to read text proto", append(PRE, "instance_groups { }")),
    ("TK105", "unexpected directory name", edit(PRE, 'name: "preprocessing"', 'name: "tokenizer"')),
    ("TK106", "at least one version must be", append(PRE, "version_policy { specific { versions: 3 } }")),
    ("TK108", "SyntaxError", lambda repository: (repository / "preprocessing/1/model.py").write_text("f(:") and None),
    ("TK109", "unexpected platform type", edit(POST, 'backend: "python"', 'platform: "python"')),
    ("TK111", "'max_batch_size' must be non-negative", edit(PRE, "max_batch_size: 8", "max_batch_size: -1")),
    ("TK112", "preferred size must be <=", edit(PRE, r"batching \{", "batching { preferred_batch_size: 9")),
    ("TK115", "specifies one or more GPUs", edit(PRE, "kind: KIND_CPU", "kind: KIND_CPU gpus: 0")),
    (
        "TK117",
        "default priority level",
        edit(PRE, r"batching \{", "batching { priority_levels: 2 default_priority_level: 3"),
    ),
    ("TK118", "response cache", append(LLM, "response_cache { enable: true }")),
    ("TK121", "must be integer >= 1, or -1", append(PRE, EXTRA_OUTPUT.replace("dims: 1", "dims: 0"))),
    (
        "TK122",  # a warning only where no step maps the output
        "multiple outputs in model",
        append(PRE, 'output { name: "INPUT_ID" data_type: TYPE_INT32 dims: -1 }'),
    ),
    ("TK123", "has different size", edit(LLM, r"reshape \{\n  \}", "reshape { shape: [ 2 ] }")),
    (
        "TK124",
        "loading failed",
        append(
            PRE,
            'model_warmup { name: "w" batch_size: 1 inputs { key: "X" value { data_type: TYPE_INT32 dims: 1 '
            "zero_data: true } } }",
        ),
    ),
    ("TK141", "not available or ambiguous: detok", edit(ENS, 'model_name: "postprocessing"', 'model_name: "detok"')),
    ("TK142", "non-existing input random_seed", edit(ENS, 'key: "seed"', 'key: "random_seed"')),
    (
        "TK143",
        "is not mapped to any ensemble tensors",
        both(
            edit(LLM, r'(name: "seed".*?)  optional: true\n', r"\1"),
            drop_ensemble_input("seed"),
            edit(ENS, SEED_INPUT, ""),
        ),
    ),
    (
        "TK144",
        "ensemble output 'finish'",
        append(ENS, 'output { name: "finish" data_type: TYPE_STRING dims: 1 }'),
    ),
    ("TK145", "ensemble input 'typo'", append(ENS, EXTRA_OUTPUT.replace("output", "input").replace("EXTRA", "typo"))),
    (
        "TK146",
        "'sead', is not connected",
        both(edit(ENS, 'value: "seed"', 'value: "sead"'), drop_ensemble_input("seed")),
    ),
    (
        "TK147",
        "'_x'",
        both(
            append(PRE, EXTRA_OUTPUT),
            edit(
                ENS, r'(    output_map \{\n      key: "OUT_PAD_ID")', r'    output_map { key: "EXTRA" value: "_x" }\n\1'
            ),
        ),
    ),
    ("TK148", "inconsistent data type", edit(ENS, r'(name: "top_p"\n  data_type: )TYPE_FP32', r"\1TYPE_FP64")),
    ("TK149", "inconsistent shape", edit(ENS, r'(name: "top_k"\n  data_type: TYPE_INT32\n  dims: )1', r"\g<1>2")),
    ("TK150", "allows maximum batch size 16", edit(ENS, "max_batch_size: 8", "max_batch_size: 16")),
    (
        "TK151",
        "is not connected",
        both(
            edit(ENS, r'(key: "END_ID"\n      value: )"end_id"', r'\1"_SEQUENCE_LENGTH"'), drop_ensemble_input("end_id")
        ),
    ),
    ("TK152", "instance group should not be", append(ENS, "instance_group { count: 1 kind: KIND_CPU }")),
    ("TK152", "empty backend type", append(ENS, 'backend: "python"')),
    (
        "TK154",
        "originated from different decoupled",
        both(
            edit(ENS, r'(key: "SEQUENCE_LENGTH"\n      value: )"_SEQUENCE_LENGTH"', r'\1"_REQUEST_INPUT_LEN"'),
            edit(ENS, r'    output_map \{\n      key: "sequence_length".*?\n    \}\n', ""),
        ),
    ),
    ("TK155", "whose required version 7", edit(ENS, "model_version: -1", "model_version: 7")),
    (
        "TK156",
        "can appear in an output map only once",
        edit(ENS, '"_PREPROCESSOR_END_ID"', '"_PREPROCESSOR_PAD_ID"', count=9),
    ),
]


def test_the_server_refuses_what_the_linter_refuses_and_loads_what_it_passes(tmp_path: Path) -> None:
    good, repository = tmp_path / "good", tmp_path / "repository"
    write_repository(generated(write_tokenizer(tmp_path / "source")), good)
    shutil.copytree(good, repository)
    surprises = []
    with serve(repository, tmp_path, "--model-control-mode=explicit") as server:

        def load() -> tuple[int, str]:
            before = server.log.stat().st_size
            status, answer = server.http("repository/models/ensemble/load", {})
            return status, answer + server.log.read_text()[before:]

        for rule, words, break_it in REFUSED:
            break_it(repository)
            findings = lint_repository(repository, server=EMBEDDED)
            assert rule in {finding.id for finding in findings}, rule
            assert has_errors(findings), rule
            status, said = load()
            if status == 200 or words not in said:
                surprises.append((rule, status, said))
            for model in (ENS, LLM, PRE, POST):
                server.http(f"repository/models/{model}/unload", {})
            shutil.rmtree(repository)
            shutil.copytree(good, repository)
        assert load()[0] == 200, server.log.read_text()[-3000:]
    assert surprises == []
