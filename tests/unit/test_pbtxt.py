"""config.pbtxt round trips, and what breaks it is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit import contract, pbtxt
from trtkit.contract import Tensor
from trtkit.errors import InputError


def small(**changes: object) -> pbtxt.Any:
    values = {
        "inputs": (Tensor("X", "INT32", (-1,), ragged=True), Tensor("S", "FP32", scalar=True, optional=True)),
        "outputs": (Tensor("Y", "STRING", (2, -1)),),
        "max_batch_size": 4,
        "decoupled": True,
        "backend": "python",
        **changes,
    }
    return pbtxt.model_config("small", **values)  # type: ignore[arg-type]


def test_the_text_is_what_triton_documents() -> None:
    text = pbtxt.dumps(small(instances=2, parameters={"b": "2", "a": "1"}, dynamic_batching={}))
    body = [line for line in text.splitlines() if not line.startswith("#")]
    expected = """name: "small"
max_batch_size: 4
input {
  name: "X"
  data_type: TYPE_INT32
  dims: -1
  allow_ragged_batch: true
}
input {
  name: "S"
  data_type: TYPE_FP32
  dims: 1
  reshape {
  }
  optional: true
}
output {
  name: "Y"
  data_type: TYPE_STRING
  dims: 2
  dims: -1
}
instance_group {
  count: 2
  kind: KIND_CPU
}
dynamic_batching {
}
parameters {
  key: "a"
  value {
    string_value: "1"
  }
}
parameters {
  key: "b"
  value {
    string_value: "2"
  }
}
backend: "python"
model_transaction_policy {
  decoupled: true
}"""
    assert body == expected.splitlines()


@given(
    parameters=st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=20), max_size=4),
    delay=st.integers(0, 10**7),
    preferred=st.lists(st.integers(1, 64), max_size=3),
)
def test_any_value_round_trips(parameters: dict[str, str], delay: int, preferred: list[int]) -> None:
    batching = {"max_queue_delay_microseconds": delay, "preferred_batch_size": preferred}
    config = small(parameters=parameters, dynamic_batching=batching)
    text = pbtxt.dumps(config)
    assert pbtxt.loads(text) == config
    assert pbtxt.dumps(pbtxt.loads(text)) == text


def test_the_transaction_policy_is_always_there() -> None:
    assert small(decoupled=False).HasField("model_transaction_policy")
    assert "model_transaction_policy {" in pbtxt.dumps(small(decoupled=False))


def test_a_misspelt_key_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="max_queue_delay"):
        small(dynamic_batching={"max_queue_delay": 5})


@pytest.mark.parametrize(
    ("text", "line", "problem", "fix"),
    [
        ('name: "x"\nmax_batch: 4', 2, 'no field named "max_batch"', "mend the line: max_batch: 4"),
        ('name: "x"\nmax_batch_size: ${size}', 2, "parse integer", "fill in the placeholder ${size}"),
        ("input [\n  {\n    data_type: TYPE_FLOAT\n  }\n]", 3, "no value named TYPE_FLOAT", "TYPE_FLOAT"),
        ("dynamic_batching { }\nsequence_batching { }", 2, "another member of oneof", "sequence_batching { }"),
        ('name: "x"\nbackend: "python', 2, "String missing ending quote", 'backend: "python'),
        ('name: "x"\ninput {\n  name: "y"\n', 3, "", ""),
        ('name: "x" name: "y"', 1, "should not have multiple", ""),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, line: int, problem: str, fix: str) -> None:
    file = tmp_path / "config.pbtxt"
    file.write_text(text)
    with pytest.raises(pbtxt.PbtxtError) as caught:
        pbtxt.load(file)
    assert caught.value.cause.startswith(f"{file}:{line}: ")
    assert "\n" not in caught.value.cause
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        pbtxt.load(tmp_path / "nowhere")


def test_the_contract_has_what_both_runtimes_share() -> None:
    inputs, outputs = contract.llm_inputs(), contract.llm_outputs()
    assert (len(inputs), len(outputs)) == (62, 21)
    assert len({t.name for t in inputs}) == 62
    step = contract.ENSEMBLE_STEPS[1]
    assert step.model == "tensorrt_llm"
    assert set(step.inputs) <= {t.name for t in contract.llm_inputs(reference=True)}
    assert set(step.outputs) <= {t.name for t in contract.llm_outputs(reference=True)}
    shared = {t.name: t for t in (*contract.llm_inputs(reference=True), *contract.llm_outputs(reference=True))}
    full = {t.name: t for t in (*inputs, *outputs)}
    assert shared == {name: full[name] for name in shared}
    assert len(shared) == 27


def test_logits_take_the_engines_dtype() -> None:
    named = {
        t.name: t.dtype for t in (*contract.llm_inputs(logits_dtype="FP16"), *contract.llm_outputs(logits_dtype="FP16"))
    }
    assert {named[name] for name in ("draft_logits", "context_logits", "generation_logits")} == {"FP16"}
    assert named["cum_log_probs"] == "FP32"
    assert {t.dtype for t in contract.llm_outputs() if "logits" in t.name} == {"FP32"}
