"""Sources and checkpoints as transformers models, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from trtkit.convert.readback import load_transformers_model
from trtkit.errors import InputError, LacksError
from trtkit.hf_config import quantized_in
from trtkit.untrusted import printable, read_json


def load_source(folder: str | Path) -> Any:
    """The model of a source folder by transformers: float32, on the CPU, in eval mode, without code of the source.

    Raises:
        InputError: transformers cannot load it.
    """
    folder = Path(folder)
    if found := quantized_in(folder, read_json(folder / "config.json")):
        raise InputError(
            f"{found[0]}: the weights are quantised{found[1]}, which transformers does not run as TensorRT-LLM does",
            f"convert it first (trtkit convert {folder} OUT) and evaluate what comes out",
        )
    # transformers 5 calls it dtype and drops the old name some day; 4 knows only the old one.
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options = {key: torch.float32, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
        raise InputError(f"{folder}: transformers cannot load the model: {reason}", "check the folder") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return model.eval()


def load_checkpoint(folder: str | Path) -> Any:
    """The model of a TRT-LLM checkpoint folder, read back from its files: float32, on the CPU, in eval mode.

    Raises: what `trtkit.convert.readback.load_transformers_model` raises.
    """
    return load_transformers_model(folder)


def usable_device(name: str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: no such name.
        LacksError: torch sees no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"'{printable(name)}' is no device", "give cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device '{printable(name)}' is neither cpu nor cuda", "give cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LacksError(f"torch sees no device '{name}' here", "use --device cpu, or install a torch build with CUDA")
    return device
