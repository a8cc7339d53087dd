"""Tokens per second of the reference runtime against transformers' `model.generate` with a static batch.

    python benchmarks/reference_runtime.py [--rounds 9] [--json] [--continuous]

Eight prompts of 32 tokens, 64 new tokens each, greedy, float32; a random Llama with hidden size 256, 6 layers, 8 heads
(4 for keys and values) and a vocabulary of 2048. Each round runs every way once, in turn, so that all see the same
machine; a ratio is the median over the rounds of (way / the faster of generate's two in that round).

    generate 1 / generate    static batch of 8 with one thread per operation / with torch's own number
    engine                   InflightBatch, eight requests that join together
    server                   eight concurrent gRPC requests to the real tritonserver, one answer each, not decoupled
    stream                   eight concurrent streams of the real tritonserver, one response per token
    continuous               transformers' generate_batch, once, because it takes so long (only with --continuous)

Engine and server use one thread per operation, which the runtime picks for a model of this size.

Predicted: engine 0.9 or more (the same forward passes, and less work between them than generate does), stream 0.8 (8
responses of 0.15 ms beside 5.5 ms of forward pass), continuous 0.04 (an earlier measurement); nothing for server.
Measured with transformers 5.23 and torch 2.13 on 2 quiet cores (load average 0.6), 7 rounds, medians: engine 1.04,
server 0.98, stream 0.69 (lowest rounds 0.79, 0.95, 0.64); on cores shared with other work (load average 2 to 5), four
runs: engine 0.87 to 1.09, server 0.89 to 1.06, stream 0.68 to 0.93, continuous 0.02 to 0.03. So the engine was as
predicted and the stream worse: a response costs 0.2 ms of the model's thread, 0.17 ms of it inside Triton's send, and
a thread of its own for sending brought no clear gain.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tritonclient import grpc

from trtkit import contract, pbtxt
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion
from trtkit.deploy.local import running_server
from trtkit.hf import open_source
from trtkit.repository.models import reference
from trtkit.repository.models.reference.generation import Generation
from trtkit.repository.models.reference.inflight import InflightBatch

REQUESTS, PROMPT, NEW, VOCABULARY = 8, 32, 64, 2048
FLOOR = 0.6
Answers = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--continuous", action="store_true", help="also run transformers' generate_batch, once")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model = random_llama()
    prompts = torch.randint(1, VOCABULARY, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        repository = write_repository(model, Path(folder))
        with running_server(repository) as deployment, grpc.InferenceServerClient(deployment.grpc_url) as client:
            answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
            client.start_stream(lambda result, error: answers.put((result, error)))
            ways: dict[str, Callable[[], Answers]] = {
                "generate 1": lambda: generate(model, prompts, 1),
                "generate": lambda: generate(model, prompts, threads),
                "engine": lambda: engine(model, prompts),
                "server": lambda: server(client, prompts),
                "stream": lambda: stream(client, answers, prompts),
            }
            report = measure(ways, options.rounds)
            client.stop_stream()
    if options.continuous:
        peer = max(report[name]["tokens_per_s"] for name in ("generate", "generate 1"))
        report["continuous"] = summary([continuous(model, prompts)], [peer])
    show(report, options.json)


def measure(ways: dict[str, Callable[[], Answers]], rounds: int) -> dict[str, dict[str, float]]:
    """Every way once per round, after one round that checks that all say the same."""
    expected = ways["generate"]()
    for name, way in ways.items():
        assert way() == expected, f"{name} differs from generate"
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        order = list(ways)
        for name in order if number % 2 else reversed(order):
            start = time.perf_counter()
            ways[name]()
            speeds[name].append(REQUESTS * NEW / (time.perf_counter() - start))
        print(f"round {number + 1} of {rounds}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    peer = [max(pair) for pair in zip(speeds["generate 1"], speeds["generate"], strict=True)]
    return {name: summary(values, peer) for name, values in speeds.items()}


def summary(speeds: list[float], peer: list[float]) -> dict[str, float]:
    ratios = [speed / best for speed, best in zip(speeds, peer, strict=True)]
    return {
        "tokens_per_s": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


def show(report: dict[str, dict[str, float]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"floor": FLOOR, "ways": report}, indent=2))
        return
    print(f"{'way':12} {'tokens/s':>9} {'ratio':>6} {'lowest':>7} {'highest':>8}")
    for name, values in report.items():
        figures = f"{values['ratio']:6.2f} {values['lowest_ratio']:7.2f} {values['highest_ratio']:8.2f}"
        print(f"{name:12} {values['tokens_per_s']:9.0f} {figures}")
    low = [name for name in ("engine", "server", "stream") if report[name]["ratio"] < FLOOR]
    print(f"floor {FLOOR}: " + (f"missed by {', '.join(low)}" if low else "reached by engine, server and stream"))


def generate(model: Any, prompts: torch.Tensor, threads: int) -> Answers:
    torch.set_num_threads(threads)
    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    answers: Answers = tokens[:, PROMPT:].tolist()
    return answers


def engine(model: Any, prompts: torch.Tensor) -> Answers:
    torch.set_num_threads(1)
    batch = InflightBatch(model, REQUESTS)
    generations = [Generation(prompt, NEW) for prompt in prompts.tolist()]
    batch.join(generations)
    while batch.running:
        batch.step()
    return [generation.output for generation in generations]


def server(client: Any, prompts: torch.Tensor) -> Answers:
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for index, prompt in enumerate(prompts.tolist()):
        client.async_infer(
            "unary",
            inputs(prompt),
            callback=lambda result, error, index=index: answers.put((index, result, error)),
            outputs=OUTPUTS,
        )
    received: Answers = [[] for _ in range(REQUESTS)]
    for _ in range(REQUESTS):
        index, result, error = answers.get(timeout=120)
        if error is not None:
            raise error
        received[index] = result.as_numpy("output_ids")[0, 0].tolist()
    return received


def stream(client: Any, answers: queue.Queue[tuple[Any, Any]], prompts: torch.Tensor) -> Answers:
    for index, prompt in enumerate(prompts.tolist()):
        client.async_stream_infer(
            "streams",
            inputs(prompt, streaming=True),
            request_id=str(index),
            outputs=OUTPUTS,
            enable_empty_final_response=True,
        )
    received: Answers = [[] for _ in range(REQUESTS)]
    unfinished = REQUESTS
    while unfinished:
        result, error = answers.get(timeout=120)
        if error is not None:
            raise error
        response = result.get_response()
        received[int(response.id)] += result.as_numpy("output_ids")[0, 0].tolist()
        unfinished -= response.parameters["triton_final_response"].bool_param
    return received


def continuous(model: Any, prompts: torch.Tensor) -> float:
    """Tokens per second of transformers' continuous batching."""
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    start = time.perf_counter()
    answers = model.generate_batch(prompts.tolist(), generation_config=settings)
    return sum(len(answer.generated_tokens) for answer in answers.values()) / (time.perf_counter() - start)


OUTPUTS = [grpc.InferRequestedOutput(name) for name in ("output_ids", "sequence_length")]


def inputs(prompt: list[int], *, streaming: bool = False) -> list[Any]:
    arrays = {
        "input_ids": np.array([prompt], dtype=np.int32),
        "input_lengths": np.array([[len(prompt)]], dtype=np.int32),
        "request_output_len": np.array([[NEW]], dtype=np.int32),
    }
    tensors = [grpc.InferInput(name, array.shape, "INT32") for name, array in arrays.items()]
    for tensor, array in zip(tensors, arrays.values(), strict=True):
        tensor.set_data_from_numpy(array)
    if streaming:
        tensors.append(grpc.InferInput("streaming", (1, 1), "BOOL"))
        tensors[-1].set_data_from_numpy(np.array([[True]]))
    return tensors


def random_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_repository(model: Any, folder: Path) -> Path:
    """The model as a checkpoint, served twice: answering once, and streaming."""
    model.save_pretrained(folder / "source")
    source = open_source(folder / "source")
    convert(plan_conversion(source, CheckpointConfig(dtype="float32")), source, folder / "checkpoint")
    for name, decoupled in (("unary", False), ("streams", True)):
        message = pbtxt.model_config(
            name,
            inputs=contract.llm_inputs(reference=True),
            outputs=contract.llm_outputs(reference=True),
            max_batch_size=REQUESTS,
            decoupled=decoupled,
            backend="python",
            parameters={"checkpoint_dir": str(folder / "checkpoint"), "exclude_input_in_output": "true"},
            dynamic_batching={},
        )
        version = folder / "repository" / name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(pbtxt.dumps(message))
        shutil.copy(Path(reference.__file__).parent / "model.py", version / "model.py")
    return folder / "repository"


if __name__ == "__main__":
    main()
