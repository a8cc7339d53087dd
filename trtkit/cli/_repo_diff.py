"""`trtkit repo diff`: what changed between two model repositories."""

from __future__ import annotations

from pathlib import Path

import click

from trtkit.cli._common import json_option, print_json, print_table

_folder = click.Path(path_type=Path)


@click.command()
@click.argument("first", metavar="A", type=_folder)
@click.argument("second", metavar="B", type=_folder)
@json_option
def diff(first: Path, second: Path, as_json: bool) -> None:
    """Say what changed from model repository A to B, and whether clients notice.

    It compares what the files say: models, versions, fields of config.pbtxt, tokenizers, keys of JSON and YAML files,
    and the content of all others. Order of tensors, comments and formatting do not count. Clients notice a change of
    the contract: models, names, types and shapes of tensors, decoupled, max_batch_size.
    Exit code: 0 equal, 1 different, 2 a repository cannot be read.

    \b
    Example:
      trtkit repo diff ./models ./models.new
      trtkit repo diff ./models ./models.new --json
    """
    from trtkit.repository.diff import diff_repositories

    found = diff_repositories(first, second)
    notice = any(one.clients_notice for one in found)
    if as_json:
        answer = {"equal": not found, "clients_notice": notice, "differences": [one.to_dict() for one in found]}
        print_json(answer)
    elif not found:
        click.echo("no differences")
    else:
        rows = [(one.kind, one.place, one.before, one.after, "yes" if one.clients_notice else "") for one in found]
        print_table(("change", "where", "before", "after", "clients notice"), rows)
        click.echo(
            f"{len(found)} difference{'s' * (len(found) != 1)}; clients {'notice' if notice else 'do not notice'}"
        )
    if found:
        raise click.exceptions.Exit(1)
