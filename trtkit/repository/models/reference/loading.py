"""A TRT-LLM checkpoint as a transformers model on the CPU, as the parameters of a config.pbtxt describe it.

Two models load it: `tensorrt_llm` of the `reference` runtime, and `llm` when it has this engine in its own process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.repository.models.reference.parameters import Parameters

SMALL = 50_000_000
"""Parameters below which several threads per operation lose: each operation takes microseconds, and threads that wait
for each other at its end stand still whenever the server or a client has the core."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that can be run.

    Attributes:
        model: a transformers causal language model in eval mode.
        max_seq_len: most tokens of prompt and output.
    """

    model: Any
    max_seq_len: int

    @property
    def vocab_size(self) -> int:
        size: int = self.model.config.vocab_size
        return size


def load_checkpoint(parameters: Parameters, version: Path) -> Loaded:
    """Loads what `checkpoint_dir` names, and sets how many threads torch uses in this process.

    Args:
        parameters: `checkpoint_dir`; optionally `max_seq_len` and `torch_threads`.
        version: the folder that `checkpoint_dir` is relative to.

    Raises:
        InputError: a parameter or the checkpoint is wrong.
    """
    import torch

    from trtkit.checkpoint import open_checkpoint
    from trtkit.convert.readback import load_transformers_model

    folder = version / parameters.text("checkpoint_dir", need=True)
    longest = parameters.longest_sequence(open_checkpoint(folder).config)
    threads = parameters.integer("torch_threads")
    model = load_transformers_model(folder)
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    if threads := threads or (1 if small else None):
        torch.set_num_threads(threads)
    return Loaded(model, longest)
