"""`trtkit build`: a build config becomes a checkpoint and an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.build import BuildPlan, Built
    from trtkit.store import ArtifactStore


@click.command("build")
@click.argument("configs", metavar="CONFIG...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--store", "root", type=click.Path(path_type=Path), help="Artifact store [default: $TRTKIT_STORE].")
@dry_run_option
@json_option
def command(configs: tuple[Path, ...], root: Path | None, dry_run: bool, as_json: bool) -> None:
    """Convert and compile what each CONFIG describes, through the artifact store.

    What is finished already is reused. With --dry-run the exact trtllm-build line is printed and nothing is done. The
    store is $TRTKIT_STORE, else ~/.cache/trtkit/store.

    \b
    Example:
      trtkit build build_configs/tiny-llama.yaml
      trtkit build build_configs/llama-3.1-8b-fp16.yaml --dry-run
    """
    from trtkit.build import SKIPPED, plan
    from trtkit.config_file import load_config
    from trtkit.store import ArtifactStore, default_root

    store = ArtifactStore(root or default_root())
    plans = [(path, plan(load_config(path), store)) for path in configs]
    results = []
    for path, planned in plans:
        if planned.command is None:
            note(f"{path}: no engine step: {SKIPPED}")
        if dry_run:
            results.append(_preview(planned, as_json))
        else:
            built = _run(planned, store)
            results.append({"config": str(path), **built.to_dict()})
            if not as_json:
                _print(path, built)
    if as_json:
        print_json(results)


def _run(planned: BuildPlan, store: ArtifactStore) -> Built:
    from trtkit.build import run

    with progress(f"building {planned.config.name}") as update:
        return run(planned, store, on_step=note, on_progress=update, on_line=note)


def _preview(planned: BuildPlan, as_json: bool) -> dict[str, Any]:
    line = planned.command.line if planned.command else None
    preview = {
        "name": planned.config.name,
        "source": str(planned.source.path),
        "checkpoint": str(planned.checkpoint_dir),
        "checkpoint_exists": planned.checkpoint_dir.exists(),
        "engine": str(planned.engine_dir) if planned.engine_dir else None,
        "command": planned.command.argv if planned.command else None,
    }
    if not as_json:
        click.echo(f"convert {planned.source.path} -> {planned.checkpoint_dir}")
        click.echo(line or "no engine step")
    return preview


def _print(path: Path, built: Built) -> None:
    rows = [("checkpoint", "reused" if built.checkpoint_reused else "built", built.checkpoint_dir)]
    if built.engine_dir:
        rows.append(("engine", "reused" if built.engine_reused else "built", built.engine_dir))
    print_table(["artifact", "", "folder"], rows, str(path))
