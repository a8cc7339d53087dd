"""`trtkit releases`: which container, TensorRT-LLM, TensorRT, CUDA and driver go together."""

from __future__ import annotations

import click

from trtkit.cli._common import json_option, print_json, print_table


@click.command()
@click.argument("tag", required=False)
@json_option
def command(tag: str | None, as_json: bool) -> None:
    """Show what is in Triton's TensorRT-LLM containers; with TAG (YY.MM), in that one.

    An engine runs only with the TensorRT-LLM version that built it, so build and serve with one release. "Engines"
    says whether the release can still compile them; TensorRT-LLM 1.3 dropped that.

    \b
    Example:
      trtkit releases
      trtkit releases 26.07 --json
    """
    from trtkit import releases

    found = [releases.get(tag)] if tag else list(releases.load())
    if as_json:
        print_json(found[0].to_dict() if tag else [release.to_dict() for release in found])
    elif tag:
        release = found[0]
        print_table(
            ("what", "version"),
            [
                ("image", release.image),
                ("TensorRT-LLM", release.tensorrt_llm),
                ("TensorRT", release.tensorrt),
                ("CUDA", release.cuda),
                ("driver", release.driver),
                ("Python", release.python),
                ("compiles engines", _yes(release.has_engine_builder)),
            ],
        )
    else:
        columns = ("Release", "TensorRT-LLM", "TensorRT", "CUDA", "Driver", "Python", "Engines")
        rows = [
            (one.tag, one.tensorrt_llm, one.tensorrt, one.cuda, one.driver, one.python, _yes(one.has_engine_builder))
            for one in found
        ]
        print_table(columns, rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
