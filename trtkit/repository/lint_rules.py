"""The table of lint rules, and a repository read for them.

Every error rule is something a real Triton server refuses, hangs on or serves wrongly (checked on 2.51). The server
often says no more than "failed to poll from model repository", so a finding names the file, the line and the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trtkit.findings import Finding, Severity


class Rule(NamedTuple):
    severity: Severity
    title: str


RULES: dict[str, Rule] = {
    # one model: files
    "TK101": Rule("error", "the repository holds no models"),
    "TK102": Rule("error", "a model directory has no config.pbtxt"),
    "TK103": Rule("error", "config.pbtxt breaks Triton's schema"),
    "TK104": Rule("warning", "a placeholder ${...} is left in a text"),
    "TK105": Rule("error", "name differs from the model directory"),
    "TK106": Rule("error", "no version directory that the version policy serves"),
    "TK107": Rule("error", "a python model has no model.py (the server would hang)"),
    "TK108": Rule("error", "model.py is not valid Python"),
    "TK109": Rule("error", "unknown platform"),
    "TK110": Rule("warning", "neither backend nor platform is given"),
    # one model: batching and instances
    "TK111": Rule("error", "max_batch_size is negative"),
    "TK112": Rule("error", "a preferred batch size is not between 1 and max_batch_size"),
    "TK113": Rule("warning", "dynamic batching has no effect with max_batch_size 0"),
    "TK114": Rule("warning", "ragged input has no effect with max_batch_size 0"),
    "TK115": Rule("error", "KIND_CPU or KIND_MODEL instances with a list of GPUs"),
    "TK116": Rule("warning", "priority levels stall the dynamic batcher"),
    "TK117": Rule("error", "default priority level out of range"),
    "TK118": Rule("error", "response cache on a decoupled model"),
    "TK119": Rule("warning", "ordering or sequence batching on a decoupled model"),
    # one model: tensors
    "TK121": Rule("error", "a tensor has no name, type or dims, or a dim of 0"),
    "TK122": Rule("warning", "a tensor name is given twice"),
    "TK123": Rule("error", "reshape changes the number of elements"),
    "TK124": Rule("error", "warmup names an unknown input"),
    # one model: what model.py holds
    "TK125": Rule("error", "model.py has no class TritonPythonModel"),
    "TK126": Rule("error", "model.py imports a generated helper that is not beside it"),
    "TK127": Rule("warning", "model.py imports a module that is neither beside it nor installed here"),
    # one model: parameters
    "TK131": Rule("warning", "a folder that a parameter names is not on this machine"),
    "TK132": Rule("error", "the tokenizer is missing from the repository"),
    "TK133": Rule("error", "a checkpoint or engine lacks the file of a rank"),
    "TK134": Rule("error", "a parameter of the tensorrtllm backend has an invalid value"),
    "TK135": Rule("error", "the tokenizer cannot be loaded"),
    "TK136": Rule("warning", "the tokenizer's decoder has no fixed text per token, so streams may lose spaces"),
    "TK137": Rule("error", "a path that a python model reads is not ASCII, which the server's Python cannot open"),
    "TK138": Rule("error", "checkpoint_dir is missing from a folder that is on this machine (else TK131)"),
    # ensembles
    "TK141": Rule("error", "a step names a model that the repository lacks"),
    "TK142": Rule("error", "a step maps a tensor that its model lacks"),
    "TK143": Rule("error", "a required input of a step is not mapped"),
    "TK144": Rule("error", "an output of the ensemble is not produced by any step"),
    "TK145": Rule("error", "an input of the ensemble is not used"),
    "TK146": Rule("error", "a step consumes a tensor that nothing produces"),
    "TK147": Rule("error", "a step produces a tensor that nothing uses"),
    "TK148": Rule("error", "a tensor has different types at its two ends"),
    "TK149": Rule("error", "a tensor has different shapes at its two ends"),
    "TK150": Rule("error", "max_batch_size is greater than that of a step"),
    "TK151": Rule("error", "the steps form a circle"),
    "TK152": Rule("error", "a setting that ensembles may not have"),
    "TK153": Rule("error", "a step behind a decoupled step has several instances, which mix up the order of a stream"),
    "TK154": Rule("error", "tensors from before and after a decoupled step meet"),
    "TK155": Rule("error", "a step asks for a version that its model does not serve"),
    "TK156": Rule("error", "a tensor is produced twice"),
}


@dataclass(frozen=True)
class Model:
    """One model directory, read.

    Attributes:
        name: the directory's name, under which the server and ensembles know it.
        text: of config.pbtxt.
        config: the `ModelConfig` message; None when there is no config.pbtxt or it cannot be read.
        versions: numbers of its version directories.
    """

    name: str
    path: Path
    text: str
    config: Any
    versions: tuple[int, ...]

    @property
    def is_ensemble(self) -> bool:
        return bool(self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling"))

    def served_versions(self) -> tuple[int, ...]:
        """Versions that the version policy serves, as far as they exist. Without a policy the newest one."""
        policy = self.config.version_policy
        kind = policy.WhichOneof("policy_choice")
        if kind == "all":
            return self.versions
        if kind == "specific":
            return tuple(v for v in self.versions if v in policy.specific.versions)
        newest = policy.latest.num_versions if kind == "latest" else 1
        return self.versions[-newest:] if newest else ()

    def place(self, *words: str) -> str:
        """config.pbtxt with the first line that holds one of the words: quoted, or else bare."""
        lines = self.text.splitlines()
        for form in [f'"{word}"' for word in words] + [*words]:
            for number, line in enumerate(lines, 1):
                if form in line:
                    return f"{self.name}/config.pbtxt:{number}"
        return f"{self.name}/config.pbtxt"


def finding(rule: str, place: str, cause: str, fix: str) -> Finding:
    """A finding of a rule in the table."""
    return Finding(rule, RULES[rule].severity, place, cause, fix)
