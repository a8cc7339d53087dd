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
