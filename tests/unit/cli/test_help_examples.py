"""The examples in the help of every command: their options exist, and so do the files of this repository they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from trtkit.cli import VERBS, group

ROOT = Path(__file__).parents[3]


def commands() -> Iterator[click.Command]:
    """Every command, with the subcommands of groups."""
    waiting: list[click.Command] = [group]
    while waiting:
        command = waiting.pop()
        yield command
        if command is group:
            waiting += [found for verb in VERBS if (found := group.get_command(click.Context(group), verb))]
        elif isinstance(command, click.Group):
            waiting += command.commands.values()


def examples(text: str) -> list[str]:
    """Lines of the Example blocks that run trtkit; a backslash at the end of a line continues it."""
    found = []
    for block in re.findall(r"^ *Examples?:\n((?: +\S.*\n?)+)", text, re.MULTILINE):
        lines = re.sub(r" *\\\n *", " ", block).splitlines()
        found += [line.strip() for line in lines if line.strip().startswith("trtkit ")]
    return found


def texts() -> Iterator[str]:
    """The help of every command and the docstring of every verb's module."""
    import importlib

    for command in commands():
        yield f"{command.help or ''}\n".replace("\b", "")
    for module, _ in VERBS.values():
        yield f"{importlib.import_module(module).__doc__}\n"


EXAMPLES = sorted({line for text in texts() for line in examples(text)})


def parse(words: list[str], command: click.Command, parent: click.Context | None = None) -> None:
    """Parses as click does before it runs anything."""
    context = click.Context(command, parent=parent, info_name=command.name)
    command.parse_args(context, list(words))
    if isinstance(command, click.Group):
        _, child, left = command.resolve_command(context, [*context._protected_args, *context.args])
        assert child is not None
        parse(left, child, context)


@pytest.fixture(autouse=True)
def any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files need not exist for click: a reader has other ones."""
    for command in commands():
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                monkeypatch.setattr(parameter, "type", click.Path(path_type=Path))


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_parses_and_names_files_that_exist(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    parse(words, group)
    for word in words:
        if re.match(r"(build_configs|examples)/", word):
            assert (ROOT / word).exists(), word


def test_every_verb_has_an_example_here() -> None:
    assert {line.split()[1] for line in EXAMPLES} >= set(VERBS)


@pytest.mark.parametrize("line", ["trtkit loadtest --no-such-option", "trtkit repo nothing", "trtkit validate a b"])
def test_a_wrong_example_would_be_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(shlex.split(line)[1:], group)
