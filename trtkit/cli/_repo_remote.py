"""`trtkit repo push | pull`: model repositories in object stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.repository.remote import Transfer

_folder = click.Path(path_type=Path, file_okay=False)
_model_option = click.option("--model", "models", multiple=True, metavar="NAME", help="This model alone; repeatable.")


@click.command()
@click.argument("repository", metavar="REPO", type=_folder)
@click.argument("url")
@_model_option
@dry_run_option
@json_option
def push(repository: Path, url: str, models: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Bring the versions in REPO to URL (s3://bucket/prefix or gs://bucket/prefix).

    A version is never overwritten: equal content is left as it is, other content is refused. Readers see a version when
    it is complete, and an interrupted push goes on when it is run again. config.pbtxt follows its versions; the policy
    in it is spelt out, so that a Triton that reads the bucket itself serves complete versions only. Credentials come
    from the environment, as for sources.

    \b
    Example:
      trtkit repo push ./models s3://team-models/llm
      trtkit repo push ./models gs://team-models/llm --model tensorrt_llm --dry-run
    """
    from trtkit import remote
    from trtkit.repository.remote import push as run

    with progress(f"pushing to {remote.parse(url).url}") as update:
        done = run(repository, url, models=models, dry_run=dry_run, on_progress=update)
    _print(done, as_json, "pushed", "push")


@click.command()
@click.argument("url")
@click.argument("repository", metavar="REPO", type=_folder)
@_model_option
@dry_run_option
@json_option
def pull(url: str, repository: Path, models: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Bring the complete versions at URL into the folder REPO, verified by their checksums.

    A new REPO appears whole. Into one that exists each missing version comes in one step and the configs after it, so
    that a server that polls REPO takes them over.

    \b
    Example:
      trtkit repo pull s3://team-models/llm ./models
    """
    from trtkit import remote
    from trtkit.repository.remote import pull as run

    with progress(f"pulling from {remote.parse(url).url}") as update:
        done = run(url, repository, models=models, dry_run=dry_run, on_progress=update)
    _print(done, as_json, "pulled", "pull")


def _print(transfer: Transfer, as_json: bool, moved: str, would: str) -> None:
    if as_json:
        print_json(transfer.to_dict())
        return
    words = {"present": "there already", "moved": moved if transfer.done else f"would {would}"}
    rows = [(one.model, one.version, words[one.state], one.files, one.bytes) for one in transfer.versions]
    print_table(("model", "version", "state", "files", "bytes"), rows)
    if transfer.configs:
        note(f"config.pbtxt {'written' if transfer.done else 'would be written'}: {', '.join(transfer.configs)}")
