from __future__ import annotations

import errno
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import trtkit
from trtkit.cli import VERBS, group, main
from trtkit.cli._common import json_option, print_json
from trtkit.errors import CheckFailedError, InputError, LacksError, missing_extra

EXISTING = [verb for verb, (module, _) in VERBS.items() if importlib.util.find_spec(module)]
HEAVY = ["numpy", "torch", "transformers", "pydantic", "rich", "tritonclient", "yaml", "aiohttp", "onnx", "safetensors"]


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def tree(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from tree(child, (*path, name))


# Help


@pytest.mark.parametrize("verb", EXISTING)
def test_every_command_says_what_it_does_and_shows_an_example(verb: str) -> None:
    command = group.get_command(click.Context(group), verb)
    assert command is not None
    for path, _ in tree(command, (verb,)):
        result = CliRunner().invoke(group, [*path, "--help"])
        assert result.exit_code == 0, path
        found = re.search(r"^ *Examples?:\n +(.*)$", result.output, re.MULTILINE)
        assert found is not None, path
        assert found[1].startswith(f"trtkit {verb}"), path


def test_help_lists_every_verb() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for verb, (_, line) in VERBS.items():
        assert f"  {verb} " in result.stdout
        assert line in result.stdout
    assert run("-h").stdout == result.stdout


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, json\n"
        "from trtkit.cli import main\n"
        "try:\n main(['--help'])\n"
        "except SystemExit: print('\\n' + json.dumps([name.split('.')[0] for name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "click" in imported
    assert imported.isdisjoint(HEAVY)


def test_version() -> None:
    assert run("--version").stdout == f"trtkit, version {trtkit.__version__}\n"


# Wrong usage


@pytest.mark.parametrize(("typed", "meant"), [("covnert", "convert"), ("confg", "config"), ("load-test", "loadtest")])
def test_an_unknown_verb_suggests_the_nearest(typed: str, meant: str) -> None:
    result = run(typed)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"No such command '{typed}'" in result.stderr
    assert f"Did you mean '{meant}'?" in result.stderr


@pytest.mark.parametrize("words", [["zzzzzzzz"], ["--no-such-option"], ["config", "cp"], ["config", "ls", "--nope"]])
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    result = run(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Usage:" in result.stderr
    assert "Traceback" not in result.stderr


# Exit codes

ENDINGS: dict[str, tuple[Any, int, list[str]]] = {
    "returns": (lambda: None, 0, []),
    "check": (
        CheckFailedError("file x differs", "convert again"),
        1,
        ["error: file x differs", "  fix: convert again"],
    ),
    "input": (InputError("a\nb"), 2, ["error: a", "error: b"]),
    "lacks": (LacksError("no GPU", "get one"), 3, ["error: no GPU", "  fix: get one"]),
    "extra": (
        missing_extra("torch", "torch"),
        3,
        ["error: the Python package 'torch' is not installed", "  fix: pip install 'trtkit[torch]'"],
    ),
    "disk": (
        OSError(errno.ENOSPC, "No space left on device", "/x"),
        3,
        ["error: [Errno 28] No space left on device: '/x'", "  fix: free disk space and run again"],
    ),
    "exit": (click.exceptions.Exit(2), 2, []),
    "interrupt": (KeyboardInterrupt(), 130, ["", "interrupted"]),
    "abort": (click.exceptions.Abort(), 130, ["interrupted"]),
    "bug": (
        ZeroDivisionError("division by zero"),
        1,
        [
            "error: unexpected ZeroDivisionError: division by zero",
            "  fix: this is a bug in trtkit: please report it with the output of `trtkit --debug ...`",
        ],
    ),
}


@pytest.fixture
def boom(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`boom(ending)` makes a verb `boom` that ends that way."""
    before = signal.getsignal(signal.SIGTERM)

    def register(ending: Any) -> None:
        @click.command()
        @json_option
        def command(as_json: bool) -> None:
            if isinstance(ending, BaseException):
                raise ending
            ending()

        module = types.ModuleType("trtkit_test_boom")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "trtkit_test_boom", module)
        monkeypatch.setitem(VERBS, "boom", ("trtkit_test_boom", "Ends."))

    yield register
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ENDINGS)
def test_endings(name: str, boom: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ending, code, lines = ENDINGS[name]
    boom(ending)
    with pytest.raises(SystemExit) as stop:
        main(["boom"])
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err.splitlines()) == ("", lines)


@pytest.mark.parametrize("name", ENDINGS)
def test_failures_are_json_too(name: str, boom: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ending, code, lines = ENDINGS[name]
    boom(ending)
    with pytest.raises(SystemExit) as stop:
        main(["boom", "--json"])
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines  # people read the same as ever
    if name in ("returns", "exit"):
        assert captured.out == ""
        return
    error = json.loads(captured.out)["error"]
    assert error["exit_code"] == code
    shown = [f"error: {line}" if code != 130 else line for line in error["cause"].splitlines()]
    shown += [f"  fix: {error['fix']}"] * bool(error["fix"])
    assert shown == [line for line in lines if line]


def test_a_failure_after_the_result_leaves_one_document(boom: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def ending() -> None:
        print_json({"passed": False})
        raise CheckFailedError("1 of 2 checks failed")

    boom(ending)
    with pytest.raises(SystemExit) as stop:
        main(["boom", "--json"])
    assert stop.value.code == 1
    assert json.loads(capsys.readouterr().out) == {"passed": False}


@pytest.mark.parametrize("words", [["boom", "--json", "--nope"], ["boom", "--json", "surplus"], ["bom", "--json"]])
def test_wrong_usage_is_json_too(words: list[str], boom: Any, capsys: pytest.CaptureFixture[str]) -> None:
    boom(lambda: None)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["exit_code"] == 2 and error["fix"]
    assert error["cause"] in captured.err and "Usage:" in captured.err


@pytest.mark.parametrize("words", [["boom"], ["boom", "--", "--json"]])
def test_without_the_option_stdout_stays_empty(words: list[str], boom: Any, capsys: pytest.CaptureFixture[str]) -> None:
    boom(InputError("wrong"))
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().out == ""


def test_a_failure_whose_reader_is_gone_keeps_its_exit_code(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w") as errors, Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "trtkit", "repo", "lint", str(tmp_path / "none"), "--json"]
        assert subprocess.run(command, stdout=full, stderr=errors, timeout=60, check=False).returncode == 2
    assert "is not a folder" in (tmp_path / "errors").read_text()
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_debug_shows_the_traceback_and_changes_nothing_else(boom: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bug", "lacks"):
        ending, code, lines = ENDINGS[name]
        boom(ending)
        with pytest.raises(SystemExit) as stop:
            main(["--debug", "boom"])
        assert stop.value.code == code
        shown = capsys.readouterr().err.splitlines()
        assert shown[0] == "Traceback (most recent call last):"
        assert shown[-len(lines) :] == lines
        with pytest.raises(SystemExit):
            main(["boom"])
        assert "Traceback" not in capsys.readouterr().err


WAITING = """
import sys, time, types, click
from trtkit.cli import VERBS, main
@click.command()
def command():
    print("ready", flush=True)
    time.sleep(60)
sys.modules["waiting"] = types.ModuleType("waiting")
sys.modules["waiting"].command = command
VERBS["wait"] = ("waiting", "Waits.")
main(["wait"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate()
        timer.cancel()
    assert process.returncode == 130
    assert errors.split() == ["interrupted"]


def test_a_reader_that_goes_away_gets_no_traceback(tmp_path: Path) -> None:
    """As in `trtkit config schema | head -1`. A reader that has seen enough is no failure."""
    with (tmp_path / "errors").open("w") as errors:
        command = [sys.executable, "-m", "trtkit", "config", "schema"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 0
    assert (tmp_path / "errors").read_text() == ""
