"""`trtkit repo`: generate and lint model repositories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtkit.cli._common import dry_run_option, json_option, note, print_findings, print_json, print_table

if TYPE_CHECKING:
    from trtkit.config import BuildConfig

_folder = click.Path(path_type=Path, file_okay=False)


@click.group()
def command() -> None:
    """Generate and lint model repositories.

    \b
    Example:
      trtkit repo generate build_configs/tiny-llama.yaml --checkpoint ./checkpoint -o ./models
      trtkit repo lint ./models
    """


@command.command()
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=_folder,
    help="TRT-LLM checkpoint, for runtime 'reference'; by default from the artifact store.",
)
@click.option("--engine", type=_folder, help="Engine, for runtime 'tensorrtllm'; by default from the artifact store.")
@click.option("--store", "root", type=_folder, help="Artifact store [default: $TRTKIT_STORE].")
@click.option("--tokenizer", type=_folder, help="Folder with tokenizer.json; by default model.source of CONFIG.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The repository to write.")
@click.option(
    "--model-path-in-container", metavar="PATH", help="Absolute path where the server finds checkpoint or engine."
)
@click.option(
    "--logits-dtype", type=click.Choice(["FP32", "FP16"]), default="FP32", show_default=True, help="Of the engine."
)
@click.option("--force", is_flag=True, help="Replace a folder that trtkit did not generate.")
@dry_run_option
@json_option
def generate(
    config_file: Path,
    checkpoint: Path | None,
    engine: Path | None,
    root: Path | None,
    tokenizer: Path | None,
    output: Path,
    model_path_in_container: str | None,
    logits_dtype: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the model repository that CONFIG describes.

    The checkpoint or engine is the one that `trtkit build` made of CONFIG in the same store, unless a folder is given.
    A folder that trtkit generated earlier is replaced as a whole; any other folder is left alone without --force.

    \b
    Example:
      trtkit repo generate build_configs/tiny-llama.yaml -o ./models
      trtkit repo generate llama.yaml --engine ./engine -o ./models --model-path-in-container /models/engine
    """
    from trtkit.checkpoint import read_checkpoint_config
    from trtkit.config_file import load_config
    from trtkit.engine_files import read_engine_config
    from trtkit.repository.generate import check_replaceable, render_repository, write_repository

    config = load_config(config_file)
    if checkpoint is not None:
        read_checkpoint_config(checkpoint)
    if engine is not None:
        read_engine_config(engine)
    if checkpoint is None and engine is None and model_path_in_container is None:
        checkpoint, engine = _built(config, root)
    files = render_repository(
        config,
        tokenizer_dir=tokenizer or _tokenizer_of(config),
        checkpoint_dir=checkpoint,
        engine_dir=engine,
        model_path_in_container=model_path_in_container,
        logits_dtype=logits_dtype,
    )
    sizes = {name: len(content.encode() if isinstance(content, str) else content) for name, content in files.items()}
    if dry_run:
        check_replaceable(output, force=force)
    else:
        write_repository(files, output, force=force)
    if as_json:
        print_json({"repository": str(output), "written": not dry_run, "files": sizes})
        return
    print_table(["file", "bytes"], sorted(sizes.items()))
    note(f"{'would write' if dry_run else 'wrote'} {len(files)} files to {output}")


@command.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--rules", is_flag=True, help="Print the rules and stop.")
@json_option
def lint(path: Path | None, rules: bool, as_json: bool) -> None:
    """Find what Triton would refuse, hang on or serve wrongly, before it starts. Exit code 1 when there are errors.

    \b
    Example:
      trtkit repo lint ./models
      trtkit repo lint --rules
    """
    from trtkit.findings import has_errors
    from trtkit.repository.lint import lint_repository
    from trtkit.repository.lint_rules import RULES

    if rules:
        rows = [(number, rule.severity, rule.title) for number, rule in RULES.items()]
        if as_json:
            print_json([dict(zip(("id", "severity", "title"), row, strict=True)) for row in rows])
        else:
            print_table(["id", "severity", "rule"], rows)
        return
    if path is None:
        raise click.UsageError("Missing argument 'PATH'.")
    findings = lint_repository(path)
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        print_findings(findings, f"{path}: no findings")
    if has_errors(findings):
        raise click.exceptions.Exit(1)


def _built(config: BuildConfig, root: Path | None) -> tuple[Path, Path | None]:
    """What `trtkit build` made of this config, in the store at `root` or the default one."""
    from trtkit.build import find
    from trtkit.store import ArtifactStore, default_root

    built = find(config, ArtifactStore(root or default_root()))
    return built.checkpoint_dir, built.engine_dir


def _tokenizer_of(config: BuildConfig) -> Path:
    """The source's folder; a hub id is looked up, and its tokenizer found in the download."""
    from trtkit.hf import open_source

    source = Path(config.model.source)
    return source if source.is_dir() else open_source(config.model.source, revision=config.model.revision).path
