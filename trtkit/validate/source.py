"""The source model as the judge: greedy answers by transformers, in float32, with the logits that led to them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.errors import InputError, missing_extra
from trtkit.hf import eos_token_ids

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GreedyAnswer:
    """What the source model says to one prompt.

    Attributes:
        prompt_ids: tokens of the prompt.
        tokens: new tokens; an end-of-sequence token that ended them is the last.
        logits: [len(tokens), vocabulary] float32; row i is what token i is the largest of.
    """

    prompt_ids: list[int]
    tokens: list[int]
    logits: torch.Tensor

    def margin(self, position: int, token: int) -> float:
        """By how much the chosen token's logit exceeds that of `token` at `position`."""
        row = self.logits[position]
        return float(row[self.tokens[position]] - row[token])

    def scale(self, position: int) -> float:
        """The largest absolute logit at `position`."""
        return float(self.logits[position].abs().max())


def require_torch() -> None:
    """Raises LacksError where the `torch` extra is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise missing_extra("torch", "torch")


class Source:
    """A source folder with its tokenizer; the model is loaded by the first answer.

    Raises:
        InputError: transformers cannot load the folder.
        LacksError: torch is not installed.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        require_torch()
        from transformers import AutoTokenizer

        self.folder = folder
        self.eos_ids = frozenset(eos_token_ids(folder))
        self._trust = trust_remote_code
        self._model: Any = None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise self._unusable("tokenizer", error) from error

    def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)]

    def continuation(self, prompt_ids: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to the prompt. Decoded behind the prompt, since a tokenizer may drop the space in
        front of a text's first word."""
        prompt = self._decode(prompt_ids)
        return self._decode([*prompt_ids, *tokens]).removeprefix(prompt)

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int) -> GreedyAnswer:
        """The most likely token again and again, until an end-of-sequence token or `max_tokens`.

        A loop of our own over the forward pass: `model.generate` lets the source's generation_config bend the logits
        (repetition penalty, forced tokens), which an engine asked for greedy decoding does not know of.
        """
        import torch

        model = self._loaded()
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        step, past = torch.tensor([list(prompt_ids)]), None
        with torch.inference_mode():
            while len(tokens) < max_tokens and not (tokens and tokens[-1] in self.eos_ids):
                output = model(input_ids=step, past_key_values=past, use_cache=True)
                past, row = output.past_key_values, output.logits[0, -1].float()
                rows.append(row)
                tokens.append(int(row.argmax()))
                step = torch.tensor([[tokens[-1]]])
        return GreedyAnswer(list(prompt_ids), tokens, torch.stack(rows))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _loaded(self) -> Any:
        if self._model is None:
            import torch
            import transformers

            # transformers 5 calls it dtype and drops the old name some day; 4 knows only the old one.
            key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
            options = {key: torch.float32, "local_files_only": True, "trust_remote_code": self._trust}
            try:
                with _no_progress_bars():
                    model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, **options)
            except (OSError, ValueError, KeyError) as error:
                raise self._unusable("model", error) from error
            self._model = model.eval()
        return self._model

    def _unusable(self, what: str, error: Exception) -> InputError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return InputError(f"{self.folder}: transformers cannot load the {what}: {reason}", "check the source folder")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing bars into what a program prints."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def position_limit(folder: Path) -> int | None:
    """`max_position_embeddings` of a source: the tokens that prompt and answer may have together."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, int) and value > 0 else None
