"""Conversion against `cp` of the same bytes, and against transformers' own loader with torch splits.

    python benchmarks/convert.py                         # 4 GB, 5 rounds
    python benchmarks/convert.py --size 8 --rounds 3 --no-transformers
    python benchmarks/convert.py --memory 2 4 8          # peak memory by model size

A synthetic Llama-shaped bfloat16 checkpoint in shards is made once. Each round runs every row of the table once, one
after the other, each in a process of its own with the source in the page cache and its output removed afterwards, so
that a busy moment of the machine hits all alike. Ratios are medians over rounds of (cp's seconds / this row's seconds).

`cp` returns before its bytes are on the disk while `trtkit convert` syncs its files, so each is timed both ways: `cp`
with and without a following `sync`, convert with its own sync and, for the ratio to plain cp, without. Right before
each run the source is copied twice and the copies removed, untimed: a virtual machine gets free memory from its host at
the first touch only, and that made the same run take up to five times as long. Sizes beyond a tenth of the memory make
the kernel write to the disk meanwhile, which has the same effect on all rows, but not evenly.

Memory is the peak resident set that the kernel reports when a process ends. This process stays small, since a child
inherits its parent's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD, VOCAB = 2048, 8192, 32, 8, 64, 32000
TRANSFORMERS_ROUTE = """
import sys, torch, transformers, safetensors.torch
source, out, tp = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
state, config = model.state_dict(), model.config
heads, layers = {}, config.num_hidden_layers
for rank in range(tp):
    tensors = {"transformer.vocab_embedding.weight": state["model.embed_tokens.weight"].clone(),
               "transformer.ln_f.weight": state["model.norm.weight"].clone(),
               "lm_head.weight": state["lm_head.weight"].chunk(tp)[rank].clone()}
    for i in range(layers):
        hf, to = f"model.layers.{i}.", f"transformer.layers.{i}."
        rows = lambda name: state[hf + name + ".weight"].chunk(tp)[rank]
        columns = lambda name: state[hf + name + ".weight"].chunk(tp, dim=1)[rank].contiguous()
        tensors[to + "attention.qkv.weight"] = torch.cat([rows(f"self_attn.{x}_proj") for x in "qkv"])
        tensors[to + "attention.dense.weight"] = columns("self_attn.o_proj")
        tensors[to + "mlp.fc.weight"] = rows("mlp.gate_proj").clone()
        tensors[to + "mlp.gate.weight"] = rows("mlp.up_proj").clone()
        tensors[to + "mlp.proj.weight"] = columns("mlp.down_proj")
        for ours, theirs in (("input_layernorm", "input_layernorm"), ("post_layernorm", "post_attention_layernorm")):
            tensors[to + ours + ".weight"] = state[hf + theirs + ".weight"].clone()
    safetensors.torch.save_file(tensors, f"{out}/rank{rank}.safetensors")
"""


@dataclass(frozen=True)
class Run:
    """One measured process: wall and CPU seconds, and the peak of its resident memory in MB."""

    wall: float
    cpu: float
    rss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4, help="GB of the source")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the temporary folder)")
    parser.add_argument("--only", nargs="*", default=None, help="rows to measure beside cp's, by their names")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--make", type=Path, help="only make a source, in this folder")
    parser.add_argument("--memory", type=float, nargs="*", help="only peak memory, at these sizes in GB")
    arguments = parser.parse_args()
    if arguments.make:
        write_source(arguments.make, arguments.size)
        return
    with tempfile.TemporaryDirectory(prefix="trtkit-benchmark-", dir=arguments.folder) as name:
        if arguments.memory:
            memory(Path(name), arguments.memory, arguments.only)
        else:
            compare(Path(name), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    source = make_source(folder / "source", arguments.size)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    rows = commands(source, folder / "out", arguments.no_transformers)
    if arguments.only is not None:
        rows = {n: c for n, c in rows.items() if n.startswith("cp") or n in arguments.only}
    print(f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards, {arguments.rounds} rounds")
    runs: dict[str, list[Run]] = {name: [] for name in rows}
    for index in range(arguments.rounds):
        for name, command in rows.items():
            runs[name].append(measure(command, folder / "out", source))
            print(f"  round {index + 1}: {name}: {runs[name][-1].wall:.2f} s", file=sys.stderr)
    print(f"{'':58}{'GB/s':>7}{'of cp':>7}{'of cp+sync':>11}{'CPU s':>7}{'MB':>7}")
    for name, results in runs.items():
        against = {
            peer: statistics.median(p.wall / r.wall for p, r in zip(runs[peer], results, strict=True))
            for peer in ("cp", "cp + sync")
        }
        wall, cpu = (statistics.median(getattr(run, key) for run in results) for key in ("wall", "cpu"))
        peak = max(run.rss for run in results)
        print(f"{name:58}{size / wall / 1e9:7.2f}{against['cp']:7.2f}{against['cp + sync']:11.2f}{cpu:7.2f}{peak:7.0f}")


def memory(folder: Path, sizes: list[float], only: list[str] | None) -> None:
    print(f"{'GB':>5} {'':34}{'peak MB':>8}")
    for size in sizes:
        source = make_source(folder / "source", size)
        for name, command in commands(source, folder / "out", no_transformers=True).items():
            if name.startswith("convert") and (only is None or name in only):
                print(f"{size:5.1f} {name:34}{measure(command, folder / 'out').rss:8.0f}")
        shutil.rmtree(source)


def commands(source: Path, out: Path, no_transformers: bool) -> dict[str, list[str]]:
    convert = [sys.executable, "-m", "trtkit", "convert", str(source), str(out / "checkpoint")]
    cp = f"cp {source}/*.safetensors {out}"
    fast = ["--no-checksum", "--no-sync"]
    split = ["--tp", "8", "--parallel-embedding", "vocab"]  # otherwise each rank has a copy of the embedding
    rows = {
        "cp": ["sh", "-c", cp],
        "cp + sync": ["sh", "-c", f"{cp} && sync {out}/*.safetensors"],
        "convert TP1 (no checksum, no sync)": [*convert, *fast],
        "convert TP4 PP2 (no checksum, no sync)": [*convert, *fast, "--tp", "4", "--pp", "2"],
        "convert TP8 (no checksum, no sync)": [*convert, *fast, "--tp", "8"],
        "convert TP8, embedding split (no checksum, no sync)": [*convert, *fast, *split],
        "convert TP8, embedding split (no sync)": [*convert, "--no-sync", *split],
        "convert TP1 (no sync)": [*convert, "--no-sync"],
        "convert TP8 (no sync)": [*convert, "--no-sync", "--tp", "8"],
        "convert TP1": convert,
        "convert TP8": [*convert, "--tp", "8"],
        "convert TP2 to float16 (no checksum, no sync)": [*convert, *fast, "--tp", "2", "--dtype", "float16"],
        "convert TP2 to float16": [*convert, "--tp", "2", "--dtype", "float16"],
    }
    if not no_transformers:
        rows["transformers + torch, TP2"] = [sys.executable, "-c", TRANSFORMERS_ROUTE, str(source), str(out), "2"]
        rows["convert TP2 (no checksum, no sync)"] = [*convert, *fast, "--tp", "2"]
    return rows


def measure(command: list[str], out: Path, source: Path | None = None) -> Run:
    out.mkdir()
    subprocess.run(["sync"], check=True)  # what the last one left to be written is not this one's burden
    if source:
        for copy in ("a", "b"):
            shutil.copytree(source, out / copy)
        shutil.rmtree(out)
        out.mkdir()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{errors.decode()}")
    shutil.rmtree(out)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def make_source(folder: Path, gigabytes: float) -> Path:
    """Makes a source in a process of its own, so that this one stays small."""
    subprocess.run([sys.executable, __file__, "--make", str(folder), "--size", str(gigabytes)], check=True)
    return folder


def write_source(folder: Path, gigabytes: float) -> None:
    """A random Llama of about that size, in shards of at most 1 GB; its values are spread as weights are."""
    import ml_dtypes
    import numpy as np

    from trtkit.safetensors_io import TensorSpec, Writer

    attention = 2 * HIDDEN * HEADS * HEAD + 2 * HIDDEN * KV_HEADS * HEAD
    per_layer = 2 * (attention + 3 * HIDDEN * INTERMEDIATE)
    layers = max(8, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{prefix}self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if filled + nbytes > 1e9:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    generator = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    weight_map = {}
    for index, names in enumerate(shards):
        file = folder / f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        writer = Writer(file, [TensorSpec(name, dtype, shapes[name]) for name in names])
        for name in names:
            weight_map[name] = file.name
            count, block = int(np.prod(shapes[name])), 1 << 22
            for start in range(0, count, block):
                values = generator.standard_normal(min(block, count - start), dtype=np.float32) * 0.02
                writer.write(name, start, values.astype(dtype))
        writer.sync()
        writer.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    main()
