"""`trtkit evaluate`: what a change to a model costs, measured on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtkit.cli._common import json_option, note, open_source, print_json, print_table, progress

if TYPE_CHECKING:
    from trtkit.evaluate.comparison import Evaluation, Side
    from trtkit.quantize.calibration import Calibration

_SAMPLES = 64
_SCHEMES = ("grpc", "grpcs", "http", "https")


@click.command("evaluate")
@click.argument("reference")
@click.argument("candidate")
@click.option("--text", help="Held-out text: a .txt, .jsonl, .parquet or .npy file, or a dataset of the hub.")
@click.option("--samples", type=click.IntRange(min=1), help=f"Windows of text.  [default: {_SAMPLES}]")
@click.option("--length", type=click.IntRange(min=2), help="Tokens in each.  [default: 512, or the model's limit]")
@click.option("--seed", default=0, show_default=True, help="Draws the windows.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder with the tokenizer; by default that of the side that is a source.",
)
@click.option("--max-perplexity-increase", "limit", metavar="LIMIT", help="Fail above it: 2%, or 0.02.")
@click.option("--device", default="cpu", show_default=True, help="Where sources and checkpoints run: cpu, cuda:0 ...")
@click.option("--batch", type=click.IntRange(min=1), help="Windows at once; by default what fits in 512 MB of logits.")
@click.option("--model", default="tensorrt_llm", show_default=True, help="Engine model of a served side.")
@click.option(
    "--prefixes", default=4, show_default=True, type=click.IntRange(min=1),
    help="Next tokens asked of a server in each window, where it returns no logits.",
)  # fmt: skip
@click.option("--timeout", "timeout_s", default=120.0, show_default=True, help="Seconds for a request to a server.")
@json_option
def command(
    reference: str,
    candidate: str,
    text: str | None,
    samples: int | None,
    length: int | None,
    seed: int,
    tokenizer: Path | None,
    limit: str | None,
    model: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how much worse CANDIDATE predicts held-out text than REFERENCE.

    Each is a source (a folder or a hub id, owner/name[@revision]), a TRT-LLM checkpoint, or the url of a server
    (grpc://HOST:PORT or http://HOST:PORT). Sources and checkpoints run here, in float32, from what their files hold
    (needs the `torch` extra); both are in memory at once.

    \b
    Measured:
      perplexity       of either, and its increase with the standard error over the windows
      top-1 agreement  how often both hold the same token for the likeliest
      KL divergence    of the predictions, in nats per token: mean, 99th percentile and largest

    Windows begin with the tokens that the tokenizer puts in front of a text, as requests do; the first token of a
    window is not predicted. A server returns no logits unless its engine was built for it: then the greedy token after
    some prefixes of every window and its log-probability are compared, and perplexity and KL divergence are missing.
    A server of the fused topology takes text only and cannot be compared: evaluate the checkpoint that it serves.
    Exit code 1 when perplexity increased by more than the limit.

    \b
    Example:
      trtkit evaluate examples/tiny-llama /tmp/checkpoint --max-perplexity-increase 2%
      trtkit evaluate examples/tiny-llama /tmp/checkpoint --text heldout.jsonl --samples 16 --json
      trtkit evaluate examples/tiny-llama grpc://127.0.0.1:8001 --model tensorrt_llm
    """
    from trtkit.evaluate.comparison import evaluate
    from trtkit.evaluate.results import parse_limit
    from trtkit.quantize.calibration import load_tokens

    most = None if limit is None else parse_limit(limit)
    one, other = _side(reference, model), _side(candidate, model)
    folder = tokenizer or _tokenizer_folder((one, other), text)
    if samples is None and not (text or "").endswith(".npy"):
        samples = _SAMPLES
    note(f"reading {text or 'the built-in held-out text'} ...")
    held_out = load_tokens(folder, text, samples=samples, length=length, seed=seed, held_out=True)
    with progress("comparing", unit="windows") as update:
        found = evaluate(one, other, held_out.tokens, limit=most, on_step=note, on_progress=update, **options)
    if as_json:
        print_json({**found.to_dict(), "text": _described(held_out)})
    else:
        _print(found, held_out)
    found.check()


def _side(given: str, model: str) -> Side:
    """A side by what it looks like: url, folder, or hub id.

    Raises:
        InputError: it is none, or a folder of another kind; LacksError: the hub cannot be reached.
    """
    from trtkit.errors import InputError
    from trtkit.evaluate.comparison import Side
    from trtkit.hf import is_hub_id
    from trtkit.inspect.detect import detect

    if given.partition("://")[0].lower() in _SCHEMES:
        return Side("served", given, model)
    path = Path(given).expanduser()
    name, _, revision = given.partition("@")
    if not path.exists() and is_hub_id(name):
        return Side("source", str(open_source(name, revision or None).path))
    if not path.exists() and "://" in given:  # object storage
        return Side("source", str(open_source(given).path))
    kind = detect(path)
    if kind == "source":
        return Side("source", str(path))
    if kind == "checkpoint":
        return Side("checkpoint", str(path))
    fix = "give the checkpoint that it was made of, or the url of a server that runs it"
    raise InputError(f"{path} is {'an' if kind == 'engine' else 'a'} {kind}, which cannot be evaluated here", fix)


def _tokenizer_folder(sides: tuple[Side, Side], text: str | None) -> Path:
    """The folder whose tokenizer reads the text: the first source's. Ready token ids need but a vocabulary size."""
    from trtkit.errors import InputError

    kinds = ("source", "checkpoint") if (text or "").endswith(".npy") else ("source",)
    for kind in kinds:
        for side in sides:
            if side.kind == kind:
                return Path(side.place)
    raise InputError("neither side is a source, so there is no tokenizer for the text", "give --tokenizer DIR")


def _described(held_out: Calibration) -> dict[str, Any]:
    return {
        "origin": held_out.origin,
        "digest": held_out.digest,
        "samples": held_out.samples,
        "length": held_out.length,
        **held_out.counts,
    }


def _print(found: Evaluation, held_out: Calibration) -> None:
    rows = [("reference", str(found.reference)), ("candidate", str(found.candidate))]
    rows.append(("text", f"{held_out.samples} x {held_out.length} tokens of {held_out.origin}"))
    if scores := found.scores:
        error = "" if scores.windows < 2 else f" (standard error {scores.increase_error:.2%})"
        rows += [
            ("perplexity, reference", f"{scores.reference_perplexity:.4f}"),
            ("perplexity, candidate", f"{scores.candidate_perplexity:.4f}"),
            ("perplexity increase", f"{scores.perplexity_increase:+.2%}{error}"),
            ("top-1 agreement", f"{scores.top1_agreement:.2%} of {scores.tokens:,} tokens"),
            ("KL divergence, mean", f"{scores.mean_kl:.3g} nats per token"),
            ("KL divergence, 99th percentile", f"{scores.kl_p99:.3g} nats"),
            ("KL divergence, largest", f"{scores.max_kl:.3g} nats"),
        ]
    if (next_tokens := found.next_tokens) is not None:
        rows.append(("top-1 agreement", f"{next_tokens.top1_agreement:.2%} of {next_tokens.prefixes:,} next tokens"))
        if next_tokens.log_prob_difference is not None:
            rows.append(("log-probability, mean difference", f"{next_tokens.log_prob_difference:.3g} nats"))
        if next_tokens.disagreement_margin is not None:
            rows.append(("margin where they disagree, mean", f"{next_tokens.disagreement_margin:.3g} nats"))
    rows += [(metric, f"not measured: {why}") for metric, why in (found.missing or {}).items()]
    print_table(("what", "value"), rows)
