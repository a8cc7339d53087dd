"""`trtkit build`: a build config becomes what its runtime executes: a checkpoint, and an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.build import BuildPlan, Built
    from trtkit.config import BuildConfig
    from trtkit.store import ArtifactStore


@click.command("build")
@click.argument("configs", metavar="CONFIG...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--store", "root", type=click.Path(path_type=Path), help="Artifact store [default: $TRTKIT_STORE].")
@dry_run_option
@json_option
def command(configs: tuple[Path, ...], root: Path | None, dry_run: bool, as_json: bool) -> None:
    """Convert, quantise and compile what each CONFIG describes, through the artifact store.

    Runtime tensorrtllm gets a checkpoint and an engine, reference a checkpoint. For llmapi and vllm a quantised Hugging
    Face checkpoint is made if checkpoint.quantization asks for one; otherwise, and for onnxruntime and python, there is
    nothing to build.

    What is finished already is reused. With --dry-run the exact trtllm-build line is printed and nothing is done. The
    store is $TRTKIT_STORE, else ~/.cache/trtkit/store.

    \b
    Example:
      trtkit build build_configs/tiny-llama.yaml
      trtkit build build_configs/llama-3.1-8b-fp16.yaml --dry-run
    """
    from trtkit.build import nothing_to_build, plan
    from trtkit.config_file import load_config
    from trtkit.store import ArtifactStore, default_root

    store = ArtifactStore(root or default_root())
    configs_of = [(path, load_config(path)) for path in configs]
    reasons = [nothing_to_build(config) for _, config in configs_of]
    plans = [None if why else plan(config, store) for (_, config), why in zip(configs_of, reasons, strict=True)]
    results = []
    for (path, config), why, planned in zip(configs_of, reasons, plans, strict=True):
        skipped = planned.skipped if planned else why
        if skipped:
            note(f"{path}: {skipped}")
        if dry_run:
            results.append({**_preview(config, planned, as_json), "skipped": skipped})
            continue
        built = _run(planned, store) if planned else None
        results.append({"config": str(path), **(built.to_dict() if built else _NOTHING), "skipped": skipped})
        if built and not as_json:
            _print(path, built)
    if as_json:
        print_json(results)


_NOTHING = {"checkpoint": None, "checkpoint_reused": False, "engine": None, "engine_reused": False}


def _run(planned: BuildPlan, store: ArtifactStore) -> Built:
    from trtkit.build import run

    with progress(f"building {planned.config.name}") as update:
        return run(planned, store, on_step=note, on_progress=update, on_line=note)


def _preview(config: BuildConfig, planned: BuildPlan | None, as_json: bool) -> dict[str, Any]:
    command = planned.command if planned else None
    if planned and not as_json:
        click.echo(f"{'export' if planned.exports else 'convert'} {planned.source.path} -> {planned.checkpoint_dir}")
        click.echo(command.line if command else "no engine step")
    return {
        "name": config.name,
        "source": str(planned.source.path) if planned else config.model.source,
        "checkpoint": str(planned.checkpoint_dir) if planned else None,
        "checkpoint_exists": planned is not None and planned.checkpoint_dir.exists(),
        "engine": str(planned.engine_dir) if planned and planned.engine_dir else None,
        "command": command.argv if command else None,
    }


def _print(path: Path, built: Built) -> None:
    rows = [("checkpoint", "reused" if built.checkpoint_reused else "built", built.checkpoint_dir)]
    if built.engine_dir:
        rows.append(("engine", "reused" if built.engine_reused else "built", built.engine_dir))
    print_table(["artifact", "", "folder"], rows, str(path))
