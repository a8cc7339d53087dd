"""What the linter says about who may run code in the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from lint_cases import CODE, MODEL

from trtkit.repository.lint import Server, lint_repository


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "m" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text(MODEL)
    (folder / "model.py").write_text(CODE)
    return tmp_path / "models"


def found(repository: Path, server: Server | None = None) -> list[tuple[str, str, str]]:
    return [(item.id, item.severity, item.place) for item in lint_repository(repository, server=server or Server())]


def test_nothing(repository: Path) -> None:
    assert found(repository) == []


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("load('x', trust_remote_code=True)\n", 1),
        ("options = {'a': 1,\n  'trust_remote_code': True}\n", 2),
        ("load('x', trust_remote_code=False)\n", None),
        ("load('x', trust_remote_code=asked)\n", None),
        ("# trust_remote_code=True\n", None),
    ],
)
def test_code_that_trusts_code(repository: Path, code: str, line: int | None) -> None:
    (repository / "m/1/helper.py").write_text(code)
    expected = [("TK181", "warning", f"m/1/helper.py:{line}")] if line else []
    assert found(repository) == expected


@pytest.mark.parametrize(("value", "told"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_a_parameter_that_trusts_code(repository: Path, value: str, told: bool) -> None:
    parameter = f'parameters {{ key: "trust_remote_code" value {{ string_value: "{value}" }} }}\n'
    (repository / "m/config.pbtxt").write_text(MODEL + parameter)
    assert found(repository) == ([("TK181", "warning", "m/config.pbtxt:6")] if told else [])


def test_settings_that_trust_code(repository: Path) -> None:
    (repository / "m/1/model.yaml").write_text("model: x\ntrust_remote_code: true\n")
    assert found(repository) == [("TK181", "warning", "m/1/model.yaml:2")]


def test_code_that_others_can_change(repository: Path) -> None:
    (repository / "m/1/model.py").chmod(0o666)
    (repository / "m/1").chmod(0o777)
    assert found(repository) == [("TK183", "warning", "m/1/model.py"), ("TK183", "warning", "m/1")]


def test_paths_outside_the_repository(repository: Path) -> None:
    outside = 'parameters {{ key: "tokenizer_dir" value {{ string_value: "{}" }} }}\n'
    (repository / "m/config.pbtxt").write_text(MODEL + outside.format(repository.parent))
    assert found(repository) == [("TK185", "info", "m/config.pbtxt:6")]
    (repository / "m/config.pbtxt").write_text(MODEL + outside.format(repository / "m"))
    assert found(repository) == []


@pytest.mark.parametrize(
    ("control", "host", "severity"),
    [
        ("explicit", "0.0.0.0", "error"),  # noqa: S104 - what is warned of
        ("explicit", "192.168.0.2", "error"),
        ("poll", "0.0.0.0", "warning"),  # noqa: S104
        ("explicit", "127.0.0.1", None),
        ("explicit", "localhost", None),
        ("explicit", "::1", None),
        ("none", "0.0.0.0", None),  # noqa: S104
    ],
)
def test_model_control_on_an_open_port(repository: Path, control: str, host: str, severity: str | None) -> None:
    server = Server(model_control=control, host=host)  # type: ignore[arg-type]
    assert found(repository, server) == ([("TK182", severity, "server")] if severity else [])


def test_a_backend_folder_that_others_can_change(repository: Path, tmp_path: Path) -> None:
    backends = tmp_path / "backends"
    (backends / "python").mkdir(parents=True, mode=0o755)
    backends.chmod(0o755)
    assert found(repository, Server(backend_directory=backends)) == []
    (backends / "python").chmod(0o777)
    assert found(repository, Server(backend_directory=backends)) == [("TK184", "warning", str(backends / "python"))]
