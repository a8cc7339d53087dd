"""`trtkit verify`: a checkpoint against its source, element by element."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtkit.cli._common import json_option, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.convert.readback import Verification


@click.command("verify")
@click.argument("source")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@json_option
def command(source: str, checkpoint: str, revision: str | None, as_json: bool) -> int:
    """Put the ranks of CHECKPOINT together again and compare every element with SOURCE, bit for bit.

    When the checkpoint has another dtype, the source's value rounded to it is what counts, and the values that the
    rounding changed are counted. Exit code 1 when anything differs.

    \b
    Example:
      trtkit verify examples/tiny-llama /tmp/checkpoint
    """
    from trtkit import hf
    from trtkit.checkpoint import open_checkpoint, read_checkpoint_config
    from trtkit.convert.readback import Verification, verify
    from trtkit.errors import TrtkitError

    opened = hf.open_source(source, revision=revision)
    dtype = read_checkpoint_config(Path(checkpoint))["dtype"]
    result, damage = Verification(), ""
    try:
        with progress("verifying", unit="elements") as update:
            result = verify(opened, open_checkpoint(checkpoint), on_progress=update)
    except TrtkitError as error:  # a damaged checkpoint is a failed check, not wrong usage
        damage = error.cause
    passed = result.passed and not damage
    if as_json:
        print_json({"passed": passed, "damage": damage or None, **asdict(result)})
    elif passed:
        exact = f"{result.rounded:,} values were rounded to {dtype}" if result.rounded else "no value was rounded"
        click.echo(f"passed: {result.tensors} tensors, {result.elements:,} elements equal the source; {exact}")
    else:
        _print_differences(result, damage)
    return 0 if passed else 1


def _print_differences(result: Verification, damage: str) -> None:
    rows: list[tuple[str, str]] = [("damage", damage)] if damage else []
    rows += [(name, f"{count:,} elements differ") for name, count in result.mismatches.items()]
    rows += [(f"config.json: {key}", f"{found!r}, not {want!r}") for key, (want, found) in result.settings.items()]
    print_table(["where", "what"], rows, "FAILED: the checkpoint is not its source")
