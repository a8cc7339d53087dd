"""`trtkit repo lint`: findings about a model repository, for people, programs and code review."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtkit.cli._common import json_option, note, print_findings, print_json, print_table

if TYPE_CHECKING:
    from trtkit.config import BuildConfig
    from trtkit.repository.lint import Server

_folder = click.Path(path_type=Path, file_okay=False)
_EMBEDDED_RELEASES = {"0.7": "24.10"}
"""Release whose server a version of nvidia-pytriton carries."""


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--config",
    "config_file",
    metavar="CONFIG",
    type=click.Path(path_type=Path),
    help="Build config that will serve it: checks the release, GPUs, backends and who may reach the server, too.",
)
@click.option("--engine", type=_folder, help="Compare with this engine, where the repository names a path elsewhere.")
@click.option(
    "--sarif", metavar="[FILE]", is_flag=False, flag_value="-", help="Write SARIF 2.1.0 to FILE, or to stdout."
)
@click.option("--rules", is_flag=True, help="Print the rules and stop.")
@json_option
def lint(
    path: Path | None, config_file: Path | None, engine: Path | None, sarif: str | None, rules: bool, as_json: bool
) -> None:
    """Find what Triton would refuse, hang on or serve wrongly, before it starts. Exit code 1 when there are errors.

    \b
    Example:
      trtkit repo lint ./models
      trtkit repo lint ./models --config build_configs/tiny-llama.yaml
      trtkit repo lint ./models --sarif lint.sarif
      trtkit repo lint --rules
    """
    from trtkit.config_file import load_config
    from trtkit.findings import has_errors
    from trtkit.repository.lint import Server, lint_repository

    if rules:
        _print_rules(as_json)
        return
    if path is None:
        raise click.UsageError("Missing argument 'PATH'.")
    if as_json and sarif == "-":
        raise click.UsageError("--json and --sarif both write to stdout; give --sarif a FILE.")
    server = server_of(load_config(config_file)) if config_file else Server()
    findings = lint_repository(path, server=server, engine_dir=engine)
    if sarif is not None:
        from trtkit.repository.lint.sarif import to_sarif

        log = to_sarif(findings, path)
        if sarif == "-":
            print_json(log)
        else:
            Path(sarif).write_text(json.dumps(log, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            note(f"wrote {sarif}")
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    elif sarif != "-":
        print_findings(findings, f"{path}: no findings")
    if has_errors(findings):
        raise click.exceptions.Exit(1)


def _print_rules(as_json: bool) -> None:
    from trtkit.repository.lint import RULES

    rows = [(number, rule.severity, rule.title) for number, rule in RULES.items()]
    if as_json:
        print_json([dict(zip(("id", "severity", "title"), row, strict=True)) for row in rows])
    else:
        print_table(["id", "severity", "rule"], rows)


def server_of(config: BuildConfig) -> Server:
    """What a build config says about the server. Servers that trtkit starts have a response cache where it asks
    for one."""
    from trtkit.repository.lint import Server

    deploy = config.deploy
    if deploy.target == "local":
        return _local_server(config)
    return Server(
        release=deploy.release,
        gpus=None if deploy.gpu_ids is None else len(deploy.gpu_ids),
        cache=config.serving.response_cache,
        model_control=deploy.model_control,
        host=deploy.host,
    )


def _local_server(config: BuildConfig) -> Server:
    """The server that would run on this machine, as far as its files tell."""
    from importlib import metadata

    from trtkit.deploy.server import find_server
    from trtkit.errors import TrtkitError
    from trtkit.repository.lint import Server

    release = backends = None
    folder: Path | None = None
    try:
        found = find_server()
    except TrtkitError:  # none is installed: nothing is known about it
        pass
    else:
        folder = found.backends or Path("/opt/tritonserver/backends")
        if folder.is_dir():
            backends = frozenset(item.name for item in folder.iterdir() if item.is_dir())
        if found.stub is not None:  # the embedded one
            version = metadata.version("nvidia-pytriton").rpartition(".")[0]
            release = _EMBEDDED_RELEASES.get(version)
    return Server(
        release=release,
        gpus=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        cache=config.serving.response_cache,
        model_control=config.deploy.model_control,
        host=config.deploy.host,
        backends=backends,
        is_local=True,
        backend_directory=folder,
    )
