"""One quantisation by trtkit, through its command line, measured as a peer's is.

Its one stage is the whole command: reading the source, calibrating, quantising, writing, checksums. A peer's stage of
the same name is its quantisation alone.

    python run_trtkit.py --model DIR --tokens FILE.npy --method int4_awq --out DIR --report FILE.json
"""

from __future__ import annotations

import importlib

import job

METHODS = (
    "int4_awq", "int4_wo", "int8_wo", "int8_sq", "int8_sq_plugin", "fp8", "fp8_rowwise", "w4a8_awq",
)  # fmt: skip
IMPORTS = (
    "torch",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "trtkit.cli.convert",
    "trtkit.quantized",
    "trtkit.accuracy",
    "trtkit.evaluate.models",
    "trtkit.quantize.conversion",
    "trtkit.quantize.calibration",
)
"""What is loaded late otherwise, and would be measured; the peers' scripts do the same."""
GROUPED = ("int4_awq", "w4a8_awq")


def main() -> None:
    options = job.parse(__doc__, METHODS)
    for module in IMPORTS:  # here, so that they are not measured
        importlib.import_module(module)
    from trtkit.cli import main as command_line

    work = job.Job(options, ("trtkit", "torch", "numpy"))
    out = options.out / "trtllm"
    command = ["convert", str(options.model), str(out), "--quantization", options.method]
    command += ["--calibration", str(options.tokens), "--no-accuracy"]
    if options.method in GROUPED:
        command += ["--group-size", str(options.group)]
    with work.stage("quantise"):
        try:
            command_line(command)
        except SystemExit as ended:
            if ended.code:
                raise
    work.report["files"]["trtllm"] = str(out)
    work.finish()


if __name__ == "__main__":
    main()
