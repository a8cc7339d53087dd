"""trtkit config: ready-made build configs, checks and the schema.

\b
Example:
  trtkit config ls
  trtkit config cp llama-3.1-8b-fp16
  trtkit config check llama-3.1-8b-fp16.yaml
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from trtkit.config import BuildConfig


@click.group(help=__doc__)
def command() -> None:
    pass


@command.command("ls")
@json_option
def list_configs(as_json: bool) -> None:
    """List the ready-made build configs.

    \b
    Example:
      trtkit config ls
      trtkit config ls --json
    """
    from trtkit.config_file import load_config, ready_made_configs

    rows = [_summary(file, load_config(file)) for file in ready_made_configs().values()]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "source", "dtype", "tp", "pp", "runtime", "about")
    print_table(columns, [[row[column] for column in columns] for row in rows])


@command.command("cp")
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Overwrite DEST.")
@dry_run_option
def copy_config(name: str, dest: Path | None, force: bool, dry_run: bool) -> None:
    """Copy the ready-made build config NAME to DEST (a file or a folder; default: NAME.yaml here).

    \b
    Example:
      trtkit config cp llama-3.1-8b-fp16
      trtkit config cp llama-3.1-8b-fp16 configs/production.yaml
    """
    from trtkit.config_file import ready_made_configs
    from trtkit.errors import InputError
    from trtkit.store import atomic_write

    name = name.removesuffix(".yaml")
    ready_made = ready_made_configs()
    if name not in ready_made:
        near = difflib.get_close_matches(name, ready_made, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise InputError(f"there is no ready-made build config '{name}'", f"{hint}`trtkit config ls` lists them")
    target = dest or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists() and not force:
        raise InputError(f"{target} exists already", "choose another file, or overwrite it with --force")
    text = _portable_text(ready_made[name])
    if dry_run:
        note(f"would write {target} ({len(text.encode())} bytes)")
        return
    atomic_write(target, text)
    click.echo(str(target))


@command.command("check")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@json_option
def check_configs(files: tuple[Path, ...], as_json: bool) -> None:
    """Check build configs: keys, types, ranges, release, and the trtllm-build command that they ask for.

    Exits with 2, and names every problem with file and line, when one of them is wrong.

    \b
    Example:
      trtkit config check my.yaml other.yaml
    """
    from trtkit.errors import InputError

    results = {file: _problems(file) for file in files}
    wrong = [problem for problems in results.values() for problem in problems]
    if as_json:
        print_json([{"file": str(file), "ok": not found, "problems": found} for file, found in results.items()])
        if wrong:
            raise click.exceptions.Exit(2)
        return
    for file, found in results.items():
        if not found:
            click.echo(f"{file}: ok")
    if wrong:
        raise InputError("\n".join(wrong), "`trtkit config schema` shows every key, its type and range")


@command.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of a build config, for editors.

    \b
    Example:
      trtkit config schema > build_config.schema.json
    """
    from trtkit.config_file import config_schema

    print_json(config_schema())


def _summary(file: Path, config: BuildConfig) -> dict[str, Any]:
    first = file.read_text(encoding="utf-8").split("\n", 1)[0]
    return {
        "name": config.name,
        "source": config.model.source,
        "dtype": config.checkpoint.dtype,
        "tp": config.checkpoint.tp,
        "pp": config.checkpoint.pp,
        "runtime": config.serving.runtime,
        "release": config.deploy.release,
        "about": first.removeprefix("#").strip() if first.startswith("#") else "",
    }


def _portable_text(file: Path) -> str:
    """A config's text with a source relative to its own folder made absolute, so that a copy elsewhere finds it."""
    import yaml

    from trtkit.config_file import load_config

    text = file.read_text(encoding="utf-8")
    source = load_config(file).model.source
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    model = next(value for key, value in root.value if key.value == "model")
    node = next(value for key, value in model.value if key.value == "source")
    if node.value == source:
        return text
    quoted = "'" + source.replace("'", "''") + "'"
    return text[: node.start_mark.index] + quoted + text[node.end_mark.index :]


def _problems(file: Path) -> list[str]:
    """Every problem of one file: the schema's, or else what only the whole config shows."""
    from trtkit.build import nothing_to_build
    from trtkit.config_file import load_config
    from trtkit.engine.builders import plan_build
    from trtkit.errors import InputError
    from trtkit.hf import is_hub_id

    try:
        config = load_config(file)
    except InputError as error:
        return error.cause.splitlines()
    problems = []
    try:
        served_itself = nothing_to_build(config) is not None
    except InputError as error:
        return [f"{file}: {error.cause} ({error.fix})"]
    source = config.model.source
    if not served_itself and not Path(source).exists() and not is_hub_id(source):
        problems.append(f"{file}: model.source: no folder '{source}', and not the form of a hub id")
    if config.serving.runtime == "tensorrtllm":
        try:
            plan_build(config, "checkpoint", "engine")
        except InputError as error:
            problems.append(f"{file}: {error.cause} ({error.fix})")
    return problems
