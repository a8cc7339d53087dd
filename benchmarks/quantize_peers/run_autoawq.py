"""One quantisation by AutoAWQ, written as its GEMM checkpoint where it can.

`awq` is its default, with zero points. `awq_sym` is without: the GEMM files cannot hold that, and Marlin's, which can,
want shapes that small models do not have; so the weights that it would have rounded are rounded by its own function and
written as float32.

    python run_autoawq.py --model DIR --tokens FILE.npy --method awq --out DIR --report FILE.json
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # its farewell

import job  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401  loaded late otherwise, and measured
from awq import AutoAWQForCausalLM  # noqa: E402
from awq.quantize.quantizer import AwqQuantizer  # noqa: E402
from awq.utils.module import get_named_linears  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

METHODS = ("awq", "awq_sym")


class Quantizer(AwqQuantizer):  # type: ignore[misc]
    """AutoAWQ's own, with one repair without which it destroys the model on a machine that has no GPU.

    Its search for scales keeps the weights with `.cpu()` and changes them in place; on a CPU that is no copy, so the
    scales of all twenty steps pile up. Here the weights that it keeps are copies.
    """

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any, **named: Any
    ) -> Any:
        kept = module2inspect.state_dict

        def copies(*args: Any, **kwargs: Any) -> dict[str, Any]:
            return {name: tensor.clone() for name, tensor in kept(*args, **kwargs).items()}

        module2inspect.state_dict = copies
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest, **named)
        finally:
            del module2inspect.state_dict


def write_rounded(quantizer: Any, model: Any, folder: Path) -> None:
    """The model's weights, those of the linears rounded by AutoAWQ's function, as float32 under their own names."""
    rounded = {name: tensor.float().clone() for name, tensor in model.state_dict().items()}
    for index, layer in enumerate(quantizer.modules):
        for name, linear in get_named_linears(layer).items():
            values = quantizer.pseudo_quantize_tensor(linear.weight.data.half())[0]  # it packs from float16
            rounded[f"model.layers.{index}.{name}.weight"] = values.float()
    folder.mkdir()
    if model.config.tie_word_embeddings:
        rounded.pop("lm_head.weight", None)
    save_file(rounded, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"rounded_by": "autoawq"}))


def main() -> None:
    options = job.parse(__doc__, METHODS)
    torch.set_num_threads(1)
    work = job.Job(options, ("autoawq", "torch", "transformers"))
    with work.stage("load"):
        dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        model = AutoAWQForCausalLM.from_pretrained(str(options.model), torch_dtype=dtype, device_map="cpu")
        windows = np.load(options.tokens)
    symmetric = options.method == "awq_sym"
    with work.stage("quantise"):
        model.quantize(
            None,  # the tokenizer: tokens are given
            {"zero_point": not symmetric, "q_group_size": options.group, "w_bit": 4, "version": "GEMM"},
            calib_data=windows.tolist(),
            max_calib_samples=len(windows),
            max_calib_seq_len=windows.shape[1],
            export_compatible=True,  # packing is a part of writing here
            quantizer_cls=Quantizer,
        )
    if symmetric:
        work.report["notes"].append("symmetric: its files cannot hold this model, weights rounded by its own function")
        work.write_files("rounded", lambda folder: write_rounded(model.quantizer, model.model, folder))
    else:

        def write(folder: Path) -> None:
            model.pack()
            model.save_quantized(str(folder))

        work.write_files("autoawq", write)
    work.finish()


if __name__ == "__main__":
    main()
