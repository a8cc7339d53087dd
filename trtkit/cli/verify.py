"""`trtkit verify`: a checkpoint against its checksums and its source, element by element."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtkit.cli._common import json_option, open_source, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.convert.verify import Verification


@click.command("verify")
@click.argument("paths", nargs=-1, required=True, metavar="[SOURCE] CHECKPOINT")
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@json_option
def command(paths: tuple[str, ...], revision: str | None, as_json: bool) -> int:
    """Compare the files of CHECKPOINT with their checksums; then put its ranks together again and compare every element
    with SOURCE, bit for bit. Without SOURCE only the checksums are compared. Quantised linears have to resemble the
    source's; how much they cost is what `trtkit evaluate` measures.

    When the checkpoint has another dtype, the source's value rounded to it is what counts, and the values that the
    rounding changed are counted. Exit code 1 when anything differs.

    \b
    Example:
      trtkit verify examples/tiny-llama /tmp/checkpoint
      trtkit verify /tmp/checkpoint
    """
    from trtkit.checkpoint import open_checkpoint, read_checkpoint_config
    from trtkit.convert.verify import Verification, check_files, verify
    from trtkit.errors import CheckFailedError, InputError, TrtkitError

    if len(paths) > 2:
        raise click.UsageError(f"one or two arguments are wanted, these are {len(paths)}")
    *source, checkpoint = paths
    if revision is not None and not source:
        raise click.UsageError("--revision is of SOURCE, which is not given")
    opened = open_source(source[0], revision) if source else None
    dtype = read_checkpoint_config(Path(checkpoint))["dtype"]
    result, damage = Verification(), ""
    try:
        ranks = open_checkpoint(checkpoint)
        with progress("comparing checksums") as update:
            result = files = check_files(ranks, on_progress=update)
    except TrtkitError as error:  # a damaged checkpoint is a failed check, not wrong usage
        damage = error.cause
    if opened is not None and not damage:
        try:
            with progress("comparing with the source") as update:
                result = verify(opened, ranks, on_progress=update)
            result = replace(result, files=files.files, checksums=files.checksums)
        except CheckFailedError as error:
            damage = error.cause
    if opened is None and not result.checksums and not damage:
        raise InputError(f"{checkpoint} has no checksums", "give its source too: trtkit verify SOURCE CHECKPOINT")
    passed = result.passed and not damage
    if as_json:
        print_json({"passed": passed, "damage": damage or None, **asdict(result)})
    elif passed:
        click.echo(f"passed: {_account(result, dtype)}")
    else:
        _print_differences(result, damage)
    return 0 if passed else 1


def _account(result: Verification, dtype: str) -> str:
    parts = []
    if result.checksums:
        parts.append(f"{result.checksums} files equal their checksums")
    if result.tensors:
        exact = f"{result.rounded:,} values were rounded to {dtype}" if result.rounded else "no value was rounded"
        if result.saturated:
            exact += f", {result.saturated:,} of them clipped to its range"
        parts.append(f"{result.tensors} tensors, {result.elements:,} elements equal the source; {exact}")
    if result.quantized:
        parts.append(f"{result.quantized} quantised linears resemble the source's")
    return "; ".join(parts)


def _print_differences(result: Verification, damage: str) -> None:
    rows: list[tuple[str, str]] = [("damage", damage)] if damage else []
    rows += list(result.files.items())
    rows += [(name, f"{count:,} elements differ") for name, count in result.mismatches.items()]
    rows += [(name, f"differs by {error:.0%} from the source's weight") for name, error in result.unlike.items()]
    rows += [(f"config.json: {key}", f"{found!r}, not {want!r}") for key, (want, found) in result.settings.items()]
    print_table(["where", "what"], rows, "FAILED: the checkpoint is not what it should be")
