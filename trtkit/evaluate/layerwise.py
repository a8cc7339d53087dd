"""The same comparison for models that do not fit into memory: both go through the text one decoder layer at a time.

What a layer puts out lies on disk until the next one takes it, so the memory is that of a layer and a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from trtkit.checkpoint import Checkpoint
from trtkit.convert.hidden import HiddenStates
from trtkit.convert.layerwise import LayerwiseModel, batches
from trtkit.convert.readback import CheckpointReader, round_linears
from trtkit.convert.simulate import RoundedCache
from trtkit.convert.whole import SourceReader
from trtkit.evaluate.results import Scores
from trtkit.evaluate.scores import Logits, Tokens, score
from trtkit.hf import Source

BATCH_TOKENS = 2048


def score_layers(
    source: Source,
    checkpoint: Checkpoint,
    tokens: Tokens,
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Compares a checkpoint, dequantised from its files, with its source; inputs, keys and values that an engine would
    quantise are rounded as it would.

    Args:
        tokens: (windows, length) token ids, without padding.
        folder: for hidden states while this runs.
        on_progress: called with decoder layers (done, total), those of both models.

    Raises:
        what `trtkit.convert.readback.CheckpointReader` and `trtkit.evaluate.scores.score` raise.
    """
    layers = checkpoint.config["num_hidden_layers"]

    def tell(done: int) -> None:
        on_progress(done, 2 * layers)

    with SourceReader(source, checkpoint.config) as plain, CheckpointReader(checkpoint) as quantized:
        reference = LayerwiseModel(checkpoint.config, plain.tensors, device=device)
        first = _through(reference, None, tokens, folder / "reference", tell)
        candidate = LayerwiseModel(checkpoint.config, quantized.tensors, device=device)
        second = _through(candidate, quantized, tokens, folder / "candidate", lambda layer: tell(layers + layer))
        tell(2 * layers)
        with torch.inference_mode():
            scores = score(_logits(candidate, second), tokens, _logits(reference, first), device=device)
    first.remove()
    second.remove()
    return scores


def _through(
    model: LayerwiseModel,
    quantized: CheckpointReader | None,
    tokens: Tokens,
    path: Path,
    on_layer: Callable[[int], None],
) -> HiddenStates:
    """What the last layer puts out, for all windows."""
    windows, length = tokens.shape
    parts = list(batches(windows, max(1, BATCH_TOKENS // length)))
    shape = (windows, length, int(model.model.config.get_text_config().hidden_size))
    states = [HiddenStates(path.with_name(f"{path.name}-{which}"), shape, model.dtype) for which in range(2)]
    with torch.inference_mode():
        for where in parts:
            states[0].write(where, model.embed(torch.from_numpy(np.ascontiguousarray(tokens[where]))))
        states[0].finish()
        model.release()
        for layer in range(model.layers):
            on_layer(layer)
            module = model.load(layer)
            changes = {}
            if quantized is not None:
                round_linears(module, model.architecture, quantized.roundings(layer), f"{model.path}.{layer}.")
                changes = _rounded_cache(quantized, layer)
            before, after = states[layer % 2], states[(layer + 1) % 2]
            for where in parts:
                after.write(where, model.run(layer, before.read(where, model.device), **changes))
            after.finish()
            model.unload(layer)
    states[(model.layers + 1) % 2].remove()
    return states[model.layers % 2]


def _rounded_cache(quantized: CheckpointReader, layer: int) -> dict[str, RoundedCache]:
    scale = quantized.cache_scale(layer)
    if scale is None or quantized.quantization.kv_cache is None:
        return {}
    cache = RoundedCache(quantized.quantization.kv_cache, {layer: scale})
    return {"past_key_values": cache, "layer_past": cache}


def _logits(model: LayerwiseModel, states: HiddenStates) -> Logits:
    """Logits of the windows in order: `score` asks for one batch after the other."""
    done = 0

    def logits(ids: torch.Tensor) -> torch.Tensor:
        nonlocal done
        where = slice(done, done + len(ids))
        done += len(ids)
        return model.logits(states.read(where, model.device))

    return logits
