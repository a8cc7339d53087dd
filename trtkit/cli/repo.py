"""`trtkit repo`: generate and lint model repositories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtkit.cli import _repo_diff, _repo_lint, _repo_remote, _repo_versions
from trtkit.cli._common import dry_run_option, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from trtkit.config import BuildConfig

_folder = click.Path(path_type=Path, file_okay=False)
_RUNTIMES = ["tensorrtllm", "llmapi", "vllm", "onnxruntime", "python", "reference"]  # the schema's, without its imports


@click.group()
def command() -> None:
    """Generate, lint and compare model repositories, manage versions, and share them through object stores.

    \b
    Example:
      trtkit repo generate build_configs/tiny-llama.yaml --checkpoint ./checkpoint -o ./models
      trtkit repo lint ./models
    """


for _extra in (
    _repo_lint.lint,
    _repo_diff.diff,
    _repo_remote.push,
    _repo_remote.pull,
    _repo_versions.add_version,
    _repo_versions.set_policy,
    _repo_versions.rollback,
):
    command.add_command(_extra)


@command.command()
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--runtime", type=click.Choice(_RUNTIMES), help="Instead of serving.runtime.")
@click.option("--topology", type=click.Choice(["ensemble", "fused"]), help="Instead of serving.topology.")
@click.option(
    "--checkpoint",
    type=_folder,
    help="TRT-LLM checkpoint, for runtime 'reference', by default from the artifact store; Hugging Face checkpoint, "
    "for 'llmapi' and 'vllm', by default model.source, or what was quantised of it in the artifact store.",
)
@click.option("--engine", type=_folder, help="Engine, for runtime 'tensorrtllm'; by default from the artifact store.")
@click.option("--store", "root", type=_folder, help="Artifact store [default: $TRTKIT_STORE].")
@click.option("--tokenizer", type=_folder, help="Folder with tokenizer.json; by default model.source of CONFIG.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The same as OUT.")
@click.option(
    "--model-path-in-container", metavar="PATH", help="Absolute path where the server finds checkpoint or engine."
)
@click.option(
    "--repository-in-container",
    metavar="PATH",
    help="Absolute path where the server finds the repository [default: OUT].",
)
@click.option(
    "--logits-dtype", type=click.Choice(["FP32", "FP16"]), default="FP32", show_default=True, help="Of the engine."
)
@click.option("--force", is_flag=True, help="Replace a folder that trtkit did not generate.")
@dry_run_option
@json_option
def generate(
    config_file: Path,
    out: Path | None,
    runtime: str | None,
    topology: str | None,
    checkpoint: Path | None,
    engine: Path | None,
    root: Path | None,
    tokenizer: Path | None,
    output: Path | None,
    model_path_in_container: str | None,
    repository_in_container: str | None,
    logits_dtype: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the model repository that CONFIG describes to OUT.

    The checkpoint or engine is the one that `trtkit build` made of CONFIG in the same store, unless a folder is given.
    A folder that trtkit generated earlier is replaced as a whole; any other folder is left alone without --force.

    Runtime 'python' serves a function by its annotations: NDArray[np.float32], Annotated[NDArray[np.int64], -1, 3] with
    dims, or bool, int, float, str; a default value makes an input optional, Annotated[..., "name"] names an output, and
    Iterator[...] streams.

    \b
    Example:
      trtkit repo generate build_configs/tiny-llama.yaml ./models
      trtkit repo generate build_configs/tiny-llama.yaml ./models --topology ensemble
      trtkit repo generate llama.yaml ./models --engine ./engine --model-path-in-container /models/engine
      trtkit repo generate llama.yaml ./models --runtime llmapi --dry-run --json
    """
    from trtkit.repository.generate import check_replaceable, render_repository, size_of, write_repository
    from trtkit.repository.layouts.notes import notes

    if (out is None) == (output is None):
        raise click.UsageError("Give the repository to write once: OUT, or -o OUT.")
    target = out or output or Path()
    config = _config(config_file, runtime, topology)
    if checkpoint is None and engine is None and model_path_in_container is None and _needs_build(config):
        checkpoint, engine = _built(config, root)
    files = render_repository(
        config,
        tokenizer_dir=tokenizer or _tokenizer_of(config),
        checkpoint_dir=_checked_checkpoint(config, checkpoint),
        engine_dir=_checked_engine(engine),
        model_path_in_container=model_path_in_container,
        logits_dtype=logits_dtype,
        repository_path=repository_in_container or str(target.resolve()),
    )
    sizes = {name: size_of(content) for name, content in files.items()}
    if dry_run:
        check_replaceable(target, force=force)
    else:
        write_repository(files, target, force=force)
    told = notes(config)
    if as_json:
        print_json({"repository": str(target), "written": not dry_run, "files": sizes, "notes": told})
        return
    print_table(["model", "files", "bytes"], _by_model(sizes))
    for line in told:
        note(line)
    note(f"{'would write' if dry_run else 'wrote'} {len(files)} files to {target}")


def _by_model(sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Rows of model, number of files and their bytes. `--json` has every file."""
    models = sorted({name.partition("/")[0] for name in sizes if "/" in name})
    found = [[size for name, size in sizes.items() if name.startswith(f"{model}/")] for model in models]
    return [(model, len(files), sum(files)) for model, files in zip(models, found, strict=True)]


def _config(file: Path, runtime: str | None, topology: str | None) -> BuildConfig:
    """The build config with the options in place of its own values."""
    from trtkit.config_file import load_config, with_serving

    config = load_config(file)
    changes = {key: value for key, value in (("runtime", runtime), ("topology", topology)) if value is not None}
    return with_serving(config, **changes) if changes else config


def _needs_build(config: BuildConfig) -> bool:
    """The runtime executes something that `trtkit build` makes."""
    from trtkit.build import nothing_to_build

    return nothing_to_build(config) is None


def _checked_checkpoint(config: BuildConfig, folder: Path | None) -> Path | None:
    from trtkit.checkpoint import read_checkpoint_config

    if folder is not None and config.serving.runtime in ("tensorrtllm", "reference"):
        read_checkpoint_config(folder)
    return folder


def _checked_engine(folder: Path | None) -> Path | None:
    from trtkit.engine_files import read_engine_config

    if folder is not None:
        read_engine_config(folder)
    return folder


def _built(config: BuildConfig, root: Path | None) -> tuple[Path, Path | None]:
    """What `trtkit build` made of this config, in the store at `root` or the default one."""
    from trtkit.build import find
    from trtkit.store import ArtifactStore, default_root

    built = find(config, ArtifactStore(root or default_root()))
    return built.checkpoint_dir, built.engine_dir


def _tokenizer_of(config: BuildConfig) -> Path:
    """The source's folder; a hub id is looked up, and its tokenizer found in the download. Layouts whose engine brings
    its own tokenizer, or that have none, look nowhere."""
    from trtkit.hf import open_source

    source = Path(config.model.source)
    return (
        source
        if source.is_dir() or config.serving.layout is None
        else open_source(config.model.source, revision=config.model.revision).path
    )
