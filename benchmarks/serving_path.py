"""What trtkit's serving path costs per token, against NVIDIA's models and against no serving path at all.

    python benchmarks/serving_path.py --nvidia CHECKOUT [--rounds 3] [--seconds 4] [--json FILE]

CHECKOUT is triton-inference-server/tensorrtllm_backend at c2e65b8 or earlier, with all_models/inflight_batcher_llm; its
models need `pip install pillow`. Everything runs in the real tritonserver around a stand-in engine that repeats the
prompt and computes nothing (serving_setups/echo_*.py), so what is left is the serving path. 500 prompts of 225 tokens
on average, 64 output tokens, one client process over gRPC. Every round starts each server in turn and measures all
concurrencies on it; figures are medians over the rounds, ratios are medians of the ratios within a round.

    direct          the stand-in engine alone: tokens in, tokens out
    nvidia          NVIDIA's preprocessing, postprocessing and ensemble, one instance each
    ensemble        trtkit's, one instance each
    fused           trtkit's model `llm` with the stand-in in its process, one response per token
    fused 20 ms     the same, tokens may wait up to 20 ms for company

Predicted: fused 15 to 50 us of CPU above direct, with tokens/s 0.9 of it; an ensemble with two outputs per step
instead of six 85 us below one with all. Measured (2 quiet cores, medians of 5 rounds of 4 s): fused 30 us below
direct at 32 streams and 39 at 64, tokens/s 1.56 and 1.68 of it, since two threads carry its responses (with one
thread: 39 and 52 us above, 0.70 and 0.60); ensemble 0.53 and 0.36 of the CPU that NVIDIA's adds. p99 of an ensemble's
first token is 1.03, 0.94, 0.90 and 0.74 of NVIDIA's at 1, 8, 32 and 64 streams, and varies most: where postprocessing
gets less of the cores than the stand-in, which takes no time, tokens queue in front of it. What helped there: tensors
that are kept and sent again, inputs read in one go, and no waiting for company (1 ms of it: CPU 0.35 and 0.39, p99
1.1 and 2.3 at 1 and 8). Tokenising on every core took preprocessing from 1.5 to 1.7 and 1.8 times NVIDIA's requests.

CPU is that of the server and its python models, in microseconds per token (per request for single answers). It is the
stable figure: tokens/s also depend on what else the cores do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.serving_setups import corpus, measure, setups
from benchmarks.serving_setups.setups import Setup
from trtkit.deploy.local import running_server

Figures = dict[str, Any]
Rounds = dict[tuple[str, str, int], list[Figures]]
"""(mode, setup, concurrency) -> figures of each round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nvidia", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--concurrency", default="1,8,32,64")
    parser.add_argument("--modes", default="stream,answer,preprocessing")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    models = options.nvidia / "all_models/inflight_batcher_llm"
    if not (models / "preprocessing/1/model.py").is_file():
        parser.error(f"{models} has no preprocessing/1/model.py")
    concurrencies = [int(part) for part in options.concurrency.split(",")]
    with tempfile.TemporaryDirectory(prefix="serving-path-") as work:
        tokenizer = corpus.tokenizer_folder(Path(work))
        prompts = corpus.prompts(tokenizer)
        rounds: Rounds = {}
        for number in range(options.rounds):
            for mode in options.modes.split(","):
                for name, setup in ways(mode, prompts, models, tokenizer).items():
                    print(f"round {number + 1}: {mode}, {name}", file=sys.stderr)
                    run(rounds, mode, name, setup, concurrencies, options.seconds, Path(work))
    if options.json:
        flat = [{"mode": m, "setup": s, "concurrency": c, "rounds": values} for (m, s, c), values in rounds.items()]
        options.json.write_text(json.dumps(flat, indent=1))
    report(rounds)


def ways(mode: str, prompts: setups.Prompts, models: Path, tokenizer: Path) -> dict[str, Setup]:
    """The setups of one mode, in the order in which they run."""
    streams = mode == "stream"
    text = setups.text_requests(prompts, streams)
    nvidia = partial(setups.write_nvidia, models=models, tokenizer=tokenizer, streams=streams)
    ensemble = partial(setups.write_ensemble, tokenizer=tokenizer, streams=streams)
    fused = partial(setups.write_fused, tokenizer=tokenizer, streams=streams)
    if mode == "preprocessing":
        queries = setups.preprocessing_requests(prompts)
        outputs = ["INPUT_ID", "REQUEST_INPUT_LEN"]
        return {
            "nvidia": Setup(nvidia, "preprocessing", queries, outputs),
            "ensemble": Setup(ensemble, "preprocessing", queries, outputs),
        }
    found = {"nvidia": Setup(nvidia, "ensemble", text), "ensemble": Setup(ensemble, "ensemble", text)}
    if streams:
        engine = setups.engine_requests(prompts, streams)
        direct = Setup(
            partial(setups.write_echo, streams=True), "tensorrt_llm", engine, ["output_ids", "sequence_length"]
        )
        found = {"direct": direct, **found}
    found["fused"] = Setup(fused, "llm", text)
    if streams:
        found["fused 20 ms"] = Setup(partial(fused, wait_ms=20.0), "llm", text)
    return found


def run(
    rounds: Rounds, mode: str, name: str, setup: Setup, concurrencies: list[int], seconds: float, work: Path
) -> None:
    """Starts the server, measures every concurrency after a second of warming up, and stops it."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        repository = Path(folder) / "repository"
        repository.mkdir()
        setup.write(repository)
        with running_server(repository) as deployment:
            assert deployment.grpc_url is not None
            assert deployment.pid is not None
            once: Callable[..., Figures] = partial(
                measure.load, deployment.grpc_url, deployment.pid, setup, streams=mode == "stream"
            )
            for concurrency in concurrencies:
                once(concurrency=concurrency, seconds=1.0)
                figures = once(concurrency=concurrency, seconds=seconds)
                rounds.setdefault((mode, name, concurrency), []).append(figures)


def report(rounds: Rounds) -> None:
    print(
        f"{'mode':14}{'setup':13}{'conc':>5}{'tokens/s':>10}{'req/s':>8}{'CPU us/token':>14}{'us/req':>8}"
        f"{'TTFT p50/p99 ms':>18}{'ITL p50/p99 ms':>17}{'tokens/resp':>13}"
    )
    for (mode, name, concurrency), values in rounds.items():
        m = partial(_median, values)
        print(
            f"{mode:14}{name:13}{concurrency:5}{m('tokens_per_s'):10.0f}{m('requests_per_s'):8.0f}"
            f"{m('server_us_per_token'):14.0f}{m('server_us_per_request'):8.0f}"
            f"{m('ttft_p50_ms'):10.1f}/{m('ttft_p99_ms'):7.1f}{m('itl_p50_ms'):9.1f}/{m('itl_p99_ms'):7.1f}"
            f"{m('tokens_per_response'):13.1f}"
        )
    print()
    for text, value, goal, met in goals(rounds):
        print(f"{'met ' if met else 'MISS'}  {text:66}{value:8.2f}  goal {goal}")


def goals(rounds: Rounds) -> list[tuple[str, float, str, bool]]:
    """What was aimed at: text, what came out, the goal, whether it is met."""
    found: list[tuple[str, float, str, bool]] = []

    def add(text: str, value: float | None, least: float | None = None, most: float | None = None) -> None:
        if value is not None:
            met = value >= least if least is not None else value <= (most or 0)
            found.append((text, value, f">= {least:g}" if least is not None else f"<= {most:g}", met))

    for c in sorted({concurrency for _, _, concurrency in rounds}):
        tokens = partial(_ratio, rounds, "tokens_per_s", "stream", c)
        if c in (32, 64):
            add(f"fused: CPU us/token above direct, concurrency {c}", _above(rounds, "fused", c), most=60)
            add(f"fused: tokens/s against direct, {c}", tokens("fused", "direct"), least=0.9)
            add(f"fused: tokens/s against nvidia, {c}", tokens("fused", "nvidia"), least=1.5)
            added, theirs = _above(rounds, "ensemble", c), _above(rounds, "nvidia", c)
            share = None if added is None or theirs is None else added / theirs
            add(f"ensemble: CPU above direct against nvidia's, {c}", share, most=0.5)
            add(f"ensemble: tokens/s against nvidia, {c}", tokens("ensemble", "nvidia"), least=1.25)
            answers = partial(_ratio, rounds, "requests_per_s", "answer", c)
            add(f"fused: single answers/s against nvidia, {c}", answers("fused", "nvidia"), least=2)
            add(f"ensemble: single answers/s against nvidia, {c}", answers("ensemble", "nvidia"), least=1.3)
            prepared = _ratio(rounds, "requests_per_s", "preprocessing", c, "ensemble", "nvidia")
            add(f"preprocessing: requests/s against nvidia, {c}", prepared, least=1.5)
        if c == 64:
            add("fused 20 ms: tokens/s against nvidia, 64", tokens("fused 20 ms", "nvidia"), least=5)
        for name in ("ensemble", "fused"):
            add(
                f"{name}: TTFT p99 against nvidia, {c}",
                _ratio(rounds, "ttft_p99_ms", "stream", c, name, "nvidia"),
                most=1,
            )
    return found


def _median(values: list[Figures], key: str) -> float:
    return statistics.median(figures[key] for figures in values)


def _ratio(rounds: Rounds, key: str, mode: str, concurrency: int, name: str, peer: str) -> float | None:
    pairs = zip(rounds.get((mode, name, concurrency), []), rounds.get((mode, peer, concurrency), []), strict=False)
    ratios = [one[key] / other[key] for one, other in pairs]
    return statistics.median(ratios) if ratios else None


def _above(rounds: Rounds, name: str, concurrency: int) -> float | None:
    """CPU microseconds per token above the stand-in engine alone."""
    key = "server_us_per_token"
    pairs = zip(
        rounds.get(("stream", name, concurrency), []), rounds.get(("stream", "direct", concurrency), []), strict=False
    )
    gaps = [one[key] - other[key] for one, other in pairs]
    return statistics.median(gaps) if gaps else None


if __name__ == "__main__":
    main()
