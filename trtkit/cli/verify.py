"""`trtkit verify`: a checkpoint against its source, element by element."""

from __future__ import annotations

import click

from trtkit.cli._common import json_option, print_json, print_table, progress


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
    from trtkit.checkpoint import open_checkpoint
    from trtkit.convert.readback import verify

    opened, target = hf.open_source(source, revision=revision), open_checkpoint(checkpoint)
    with progress("verifying", unit="elements") as update:
        result = verify(opened, target, on_progress=update)
    if as_json:
        print_json(
            {
                "passed": result.passed,
                "tensors": result.tensors,
                "elements": result.elements,
                "rounded": result.rounded,
                "mismatches": result.mismatches,
            }
        )
    elif result.passed:
        dtype = target.config["dtype"]
        exact = f"{result.rounded:,} values were rounded to {dtype}" if result.rounded else "no value was rounded"
        click.echo(f"passed: {result.tensors} tensors, {result.elements:,} elements equal the source; {exact}")
    else:
        rows = [(name, f"{count:,}") for name, count in result.mismatches.items()]
        print_table(["tensor", "elements that differ"], rows, f"FAILED: {len(rows)} of {result.tensors} tensors differ")
    return 0 if result.passed else 1
