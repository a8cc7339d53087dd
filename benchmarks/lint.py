"""Time to lint a repository of 1,000 models, against the limit of 5 seconds.

    python benchmarks/lint.py [--models 1000]

250 complete LLM repositories side by side: preprocessing, the engine model with its 60 inputs, postprocessing and the
ensemble, each with names of its own, tokenizers and code included. Wall time of `lint_repository` in a fresh process,
imports included; the median of several.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trtkit.config_file import parse_config
from trtkit.repository.generate import render_repository, write_repository

GOAL_S = 5.0
RUNS = 3
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble")
CODE = "import sys; from pathlib import Path; from trtkit.repository.lint import lint_repository; "
CODE += "print(len(lint_repository(Path(sys.argv[1]))))"


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


def write_models(count: int, work: Path) -> Path:
    """A repository of `count` models, whose names differ in a number."""
    config = parse_config("name: t\nmodel: {source: x}\nserving: {max_batch_size: 8, topology: ensemble}\n")
    one = work / "one"
    files = render_repository(
        config, tokenizer_dir=write_tokenizer(work / "tokenizer"), model_path_in_container="/models/engine"
    )
    write_repository(files, one)
    parts = [path for path in one.rglob("*") if path.is_file() and path.relative_to(one).parts[0] in MODELS]
    for number in range(count // len(MODELS)):
        for part in parts:
            model, *rest = part.relative_to(one).parts
            target = work / "many" / f"{model}_{number}" / Path(*rest)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = part.read_bytes()
            if part.name == "config.pbtxt":
                content = re.sub(rf'name: "({"|".join(MODELS)})"'.encode(), rf'name: "\1_{number}"'.encode(), content)
            target.write_bytes(content)
    return work / "many"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=1000)
    count = parser.parse_args().models
    with tempfile.TemporaryDirectory() as folder:
        repository = write_models(count, Path(folder))
        written = sum(1 for path in repository.iterdir())
        seconds, findings = [], ""
        for _ in range(RUNS):
            start = time.perf_counter()
            run = subprocess.run(
                [sys.executable, "-c", CODE, str(repository)], check=True, capture_output=True, text=True
            )
            seconds.append(time.perf_counter() - start)
            findings = run.stdout.strip()
    median = statistics.median(seconds)
    listed = ", ".join(f"{value:.2f}" for value in seconds)
    print(f"{written} models, {findings} findings: {median:.2f} s (median of {listed})")
    print(f"{1000 * median / written:.2f} ms per model")
    print(f"lint of {written} models / limit of {GOAL_S:g} s: {median / GOAL_S:.2f}")


if __name__ == "__main__":
    main()
