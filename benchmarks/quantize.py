"""Our quantisation against every installed peer: perplexity read back from the written files, CPU time, memory.

    python benchmarks/quantize.py --work /tmp/quantize --autoawq-python PATH --llmcompressor-python PATH
    python benchmarks/quantize.py --work /tmp/quantize --only trtkit modelopt/awq_lite --models outlier --draws 1
    python benchmarks/quantize.py --work /tmp/quantize --memory             # memory alone
    python benchmarks/quantize.py --work /tmp/quantize --memory --size 2GB  # on a random model of that size

Every job is one tool, method, model and draw of calibration windows, in a process of its own with one thread. All tools
get the same tokens of the tiny model's training text; the perplexity is that of float32 arithmetic on the weights that
the files hold, on held-out text, by one function. Its inputs are rounded where a format's kernel does so. `outlier` is
the plain model with outliers in its activations that do not change its function (benchmarks/outliers.py).

A finished job is not run again: an interrupted run goes on with the same --work, and --again names what to forget.
The columns: perplexity as mean, standard deviation and range over the draws, and how much the mean is above the
unquantised model's; median CPU seconds of the quantisation (ours: of the whole command), and of loading, quantising and
writing (all); peak resident memory above what the imports took, as median; costs also as multiples of ours. A
difference of two means is a tie if it is no larger than the larger of the two standard deviations.

ModelOpt quantises the weights anew for every batch, so peers get eight windows in one, with which its AWQ takes about
half the time of single windows, and its files were no worse. Single windows take less memory, so --memory gives them
those, and the model in its own dtype.

ModelOpt comes with the extra `peer`. The others need environments of their own, since they pin what the rest of the
project does not; 3 GB of disk with torch's CPU build, which on a machine without GPU is worth installing first:

    python3.11 -m venv llmcompressor
    llmcompressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

    python3.11 -m venv autoawq
    autoawq/bin/pip install torch==2.13.0 transformers==4.51.3 accelerate datasets setuptools wheel
    autoawq/bin/pip install --no-deps --no-build-isolation autoawq==0.2.9

and are named by `--llmcompressor-python llmcompressor/bin/python --autoawq-python autoawq/bin/python`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quantize_peers.methods import LEAN, METHODS, Method, named

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "quantize_peers"
sys.path.insert(0, str(HERE.parent / "examples"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, tokens and results")
    parser.add_argument("--source", type=Path, default=HERE.parent / "examples" / "tiny-llama", help="a trained Llama")
    parser.add_argument("--models", default="plain,outlier", help="of plain and outlier, separated by commas")
    parser.add_argument(
        "--only", nargs="*", default=None, metavar="TOOL[/METHOD]", help="instead of the default methods"
    )
    parser.add_argument("--again", nargs="*", default=[], metavar="TOOL[/METHOD]", help="forget the results of these")
    parser.add_argument("--draws", type=int, default=5, help="of calibration windows")
    parser.add_argument("--samples", type=int, default=64, help="windows per draw")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--eval-tokens", type=int, default=60_000, help="held-out tokens")
    parser.add_argument("--group", type=int, default=128, help="inputs per scale of int4 weights")
    parser.add_argument("--batch", type=int, default=8, help="windows in one forward pass of a peer that can choose")
    parser.add_argument("--peer-dtype", default="float32", help="in which peers load the model; auto is its own")
    parser.add_argument("--autoawq-python", type=Path, help="interpreter of its environment")
    parser.add_argument("--llmcompressor-python", type=Path, help="interpreter of its environment")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one job")
    parser.add_argument("--memory", action="store_true", help="compare memory alone, peers at their leanest")
    parser.add_argument("--size", help="with --memory: on a random model, of e.g. 2GB, with 16 x 512 random tokens")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.size:
        keep_settings(options)
    if options.memory:
        compare_memory(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    from quantize_peers.summary import print_summary, summarise

    methods = chosen(options, [str(method) for method in METHODS if method.default])
    models = prepare_models(options)
    draws, held_out = prepare_tokens(options)
    results_folder = options.work / "results"
    results_folder.mkdir(exist_ok=True)
    base = {
        name: unquantised(results_folder / f"base-{name}.json", folder, held_out) for name, folder in models.items()
    }
    results = []
    for model, folder in models.items():
        for draw, tokens in enumerate(draws):
            for method in methods:
                if draw and not method.draws:
                    continue
                file = results_folder / f"{model}-{method.tool}-{method.name}-{draw}.json"
                if file.exists() and not named(method, options.again):
                    results.append(json.loads(file.read_text()))
                    continue
                result = run(method, folder, tokens, options, f"{model} {method} draw {draw + 1}")
                result |= {"tool": method.tool, "method": method.name, "kind": method.kind, "draws": method.draws}
                result |= {"model": model, "draw": draw}
                if not result["finished"]:
                    continue  # told already; tried again next time
                result["perplexity"] = read_back(folder, result["files"], held_out)
                shutil.rmtree(options.work / "out")
                write_json(file, result)
                results.append(result)
                log(f"  {result['perplexity']}, {result['stages']['quantise']['cpu_s']:.1f} CPU s")
    summary = summarise(results, base) | {"settings": settings(options)}
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        sizes = f"{len(draws)} draws of {options.samples} x {options.length} tokens, groups of {options.group}"
        print(f"{sizes}; {held_out[:, 1:].size:,} held-out tokens; peers in {options.peer_dtype}")
        print_summary(summary)


def run(method: Method, model: Path, tokens: Path, options: argparse.Namespace, label: str) -> dict[str, Any]:
    """One job's report; one that failed or ran out of time has `finished` false and says why on stderr."""
    log(label)
    out = options.work / "out"
    if out.exists():
        shutil.rmtree(out)
    if method.tool == "trtkit":
        return run_ours(model, out, tokens, method.name, options.group, options.timeout)
    extra = ["--group", str(options.group), "--dtype", options.peer_dtype, "--batch", str(options.batch)]
    return run_script(interpreter(method.tool, options), method, model, tokens, out, extra, options.timeout)


def run_ours(source: Path, out: Path, tokens: Path, method: str, group: int, timeout: float = 1800) -> dict[str, Any]:
    """Ours, through the command line: the report of quantize_peers/run_trtkit.py."""
    ours = Method("trtkit", method, "")
    return run_script(Path(sys.executable), ours, source, tokens, out, ["--group", str(group)], timeout)


def run_script(
    python: Path, method: Method, model: Path, tokens: Path, out: Path, extra: list[str], timeout: float
) -> dict[str, Any]:
    report, log_file = out.with_name("report.json"), out.with_name("log.txt")
    report.unlink(missing_ok=True)
    command = [str(python), str(SCRIPTS / f"run_{method.tool}.py"), "--model", str(model), "--tokens", str(tokens)]
    command += ["--method", method.name, "--out", str(out), "--report", str(report), *extra]
    with log_file.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout)
            peak = None
        except subprocess.TimeoutExpired:
            peak = peak_mb(process.pid)
        finally:
            process.kill()
            process.wait()
    found: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {"finished": False, "stages": {}}
    if peak is not None and "before_mb" in found:
        found["growth_mb_until_stopped"] = peak - found["before_mb"]
        log(f"  stopped after {timeout:.0f} s; memory had grown by {found['growth_mb_until_stopped']:.0f} MB")
    elif not found["finished"]:
        lines = log_file.read_text(errors="replace").strip().splitlines()
        log(f"  failed: {lines[-1] if lines else 'no output'} (see {log_file})")
    for note in found.get("notes", ()):
        log(f"  {note}")
    return found


def peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024 / 1e6


def interpreter(tool: str, options: argparse.Namespace) -> Path:
    """The Python that runs a peer; a virtual environment's is a link and must not be resolved."""
    own = {"autoawq": options.autoawq_python, "llmcompressor": options.llmcompressor_python}
    return Path(os.path.abspath(own[tool])) if tool in own else Path(sys.executable)  # noqa: PTH100


def chosen(options: argparse.Namespace, default: list[str]) -> list[Method]:
    """The methods to run; those whose tool is not installed are left out, and said so."""
    import importlib.util

    asked = default if options.only is None else options.only
    methods = [method for method in METHODS if named(method, asked)]
    for word in asked:
        if not any(named(method, [word]) for method in METHODS):
            sys.exit(f"{word} is none of {', '.join(str(method) for method in METHODS)}")
    missing = {tool for tool in ("autoawq", "llmcompressor") if getattr(options, f"{tool}_python") is None}
    if importlib.util.find_spec("modelopt") is None:
        missing.add("modelopt")
    for tool in sorted(missing & {method.tool for method in methods}):
        log(f"{tool} is left out: it is not installed (--help says how)")
    return [method for method in methods if method.tool not in missing]


def prepare_models(options: argparse.Namespace) -> dict[str, Path]:
    from outliers import write_outlier_variant

    models = {"plain": options.source.resolve(), "outlier": options.work.resolve() / "outlier"}
    if not models["outlier"].exists():
        write_outlier_variant(models["plain"], models["outlier"])
    return {name: models[name] for name in options.models.split(",")}


def prepare_tokens(options: argparse.Namespace) -> tuple[list[Path], Any]:
    """A file of calibration windows, int64 (samples, length), per draw; and held-out windows, int64 (n, length + 1).

    Calibration windows begin anywhere in the training text. Held-out windows are spread evenly over the held-out files.
    """
    import numpy as np
    from tiny_text import END, documents, is_held_out, library_files
    from tokenizers import Tokenizer

    files = [options.work / f"calibration-{draw}.npy" for draw in range(options.draws)]
    held_out_file = options.work / "held-out.npy"
    if not all(file.exists() for file in [*files, held_out_file]):
        tokenizer = Tokenizer.from_file(str(options.source / "tokenizer.json"))

        def stream(texts: list[str]) -> Any:
            return np.concatenate([np.array(encoded.ids, np.int64) for encoded in tokenizer.encode_batch(texts)])

        library = library_files()
        training = stream(documents({path: text for path, text in library.items() if not is_held_out(path)}, 1))
        for draw, file in enumerate(files):
            starts = np.random.default_rng(draw).integers(0, len(training) - options.length, options.samples)
            np.save(file, training[starts[:, None] + np.arange(options.length)])
        unseen = stream([text + END for path, text in library.items() if is_held_out(path)])
        count = (len(unseen) - 1) // options.length
        kept = np.linspace(0, count - 1, min(count, options.eval_tokens // options.length)).astype(int)
        np.save(held_out_file, unseen[kept[:, None] * options.length + np.arange(options.length + 1)])
    return files, np.load(held_out_file)


def unquantised(file: Path, model: Path, held_out: Any) -> float:
    from quantize_peers.evaluation import perplexity

    if not file.exists():
        write_json(file, {"perplexity": perplexity(model, None, held_out)})
    return float(json.loads(file.read_text())["perplexity"])


def read_back(model: Path, files: dict[str, str], held_out: Any) -> dict[str, float]:
    """Format -> held-out perplexity of what its files hold."""
    import torch
    from quantize_peers.evaluation import perplexity
    from quantize_peers.readback import read

    torch.set_num_threads(1)
    return {kind: perplexity(model, read(kind, Path(folder)), held_out) for kind, folder in files.items()}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What results of one work folder must have in common."""
    weights = hashlib.sha256((options.source / "model.safetensors").read_bytes()).hexdigest()
    names = ("samples", "length", "eval_tokens", "group", "batch", "peer_dtype")
    return {"source_sha256": weights} | {name: getattr(options, name) for name in names}


def keep_settings(options: argparse.Namespace) -> None:
    file = options.work / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings(options):
        sys.exit(f"{options.work} holds results of other settings ({file}); name another --work")
    write_json(file, settings(options))


def compare_memory(options: argparse.Namespace) -> None:
    """Growth of the resident memory; what takes longer than --timeout counts as far as it came."""
    model, tokens = random_model(options) if options.size else (options.source, prepare_tokens(options)[0][0])
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    options.peer_dtype, options.batch = "auto", 1
    rows: dict[str, dict[str, Any]] = {}
    for method in chosen(options, list(LEAN)):
        found = run(method, model, tokens, options, str(method))
        shutil.rmtree(options.work / "out", ignore_errors=True)
        growth = found.get("growth_mb", found.get("growth_mb_until_stopped"))
        if growth is not None:
            cpu = found["stages"]["quantise"]["cpu_s"] if found["finished"] else None
            rows[str(method)] = {"growth_mb": growth, "cpu_s": cpu, "finished": found["finished"]}
    ours = {name: row["growth_mb"] for name, row in rows.items() if name.startswith("trtkit")}
    peers = {name: row["growth_mb"] for name, row in rows.items() if name not in ours}
    if options.json:
        print(json.dumps({"bytes": size, "rows": rows}, indent=2))
        return
    print(f"{f'model of {size / 1e6:,.0f} MB':36}{'grew by MB':>12}{'CPU s':>9}")
    for name, row in rows.items():
        cpu = f"{row['cpu_s']:9.1f}" if row["finished"] else f"  not finished in {options.timeout:.0f} s"
        print(f"{name:36}{row['growth_mb']:12.0f}{cpu}")
    for name, growth in ours.items():
        if peers:
            leanest = min(peers, key=lambda peer: peers[peer])
            print(f"{name} grew by {growth / peers[leanest]:.3f} of the leanest peer, {leanest}")


def random_model(options: argparse.Namespace) -> tuple[Path, Path]:
    import numpy as np
    from quantize_peers.random_llama import VOCABULARY, write_random_llama

    model, tokens = options.work / f"random-{options.size}", options.work / "random-tokens.npy"
    if not (model / "model.safetensors.index.json").exists():  # written last
        shutil.rmtree(model, ignore_errors=True)
        write_random_llama(model, float(options.size.upper().removesuffix("GB")) * 1e9)
    np.save(tokens, np.random.default_rng(0).integers(0, VOCABULARY, (16, 512)))
    return model, tokens


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Whole or not at all, so that a result that is there is finished."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    partial.replace(file)


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
