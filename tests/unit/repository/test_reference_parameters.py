"""Parameters of the reference model's config.pbtxt."""

from __future__ import annotations

import pytest

from trtkit.errors import InputError
from trtkit.repository.models.reference.parameters import Parameters


def test_read_from_a_model_config() -> None:
    texts = {"checkpoint_dir": "/x", "end_ids": "2, 32000,", "max_seq_len": "64", "exclude_input_in_output": "True"}
    parameters = Parameters.of({"parameters": {name: {"string_value": text} for name, text in texts.items()}})
    assert parameters.text("checkpoint_dir", need=True) == "/x"
    assert parameters.integers("end_ids") == (2, 32000)
    assert parameters.integer("max_seq_len") == 64
    assert parameters.flag("exclude_input_in_output")


@pytest.mark.parametrize("value", ["", "${not_filled_in}", None])
def test_defaults(value: str | None) -> None:
    parameters = Parameters({} if value is None else {"x": value})
    assert (parameters.text("x"), parameters.integer("x"), parameters.integers("x")) == ("", None, ())
    assert parameters.flag("x") is False
    with pytest.raises(InputError, match="'x' is missing"):
        parameters.text("x", need=True)


@pytest.mark.parametrize(
    ("read", "value"),
    [
        ("integer", "two"),
        ("integer", "1,2"),
        ("integer", "0"),
        ("integer", "-4"),
        ("integers", "1;2"),
        ("integers", "1,x"),
        ("flag", "yes"),
    ],
)
def test_wrong_values_are_named(read: str, value: str) -> None:
    with pytest.raises(InputError) as error:
        getattr(Parameters({"x": value}), read)("x")
    assert f"parameter 'x' is '{value}'" in error.value.cause
    assert error.value.fix


def test_the_longest_sequence_is_the_models_unless_it_is_set() -> None:
    rotary = {"max_position_embeddings": 64, "position_embedding_type": "rope_gpt_neox"}
    assert Parameters({}).longest_sequence(rotary) == 64
    assert Parameters({"max_seq_len": "32"}).longest_sequence(rotary) == 32
    assert Parameters({"max_seq_len": "640"}).longest_sequence(rotary) == 640


@pytest.mark.parametrize("kind", [{"position_embedding_type": "learned_absolute"}, {}])
def test_learned_positions_end_where_their_table_ends(kind: dict[str, str]) -> None:
    learned = {"max_position_embeddings": 64, **kind}  # learned is TensorRT-LLM's default
    assert Parameters({"max_seq_len": "64"}).longest_sequence(learned) == 64
    with pytest.raises(InputError, match="'max_seq_len' is 65, the model has learned 64 positions") as error:
        Parameters({"max_seq_len": "65"}).longest_sequence(learned)
    assert "64 or less" in (error.value.fix or "")
