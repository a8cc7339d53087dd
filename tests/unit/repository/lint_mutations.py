"""Random changes to good configs, one field on each line: a line goes, comes twice or moves, or a value changes.

Counts stay small: each instance is a process.
"""

from __future__ import annotations

import random
import re

from lint_cases import CODE, DECOUPLED, ENSEMBLE, MODEL, Files
from tritonclient.grpc import model_config_pb2 as pb

RICH = (
    MODEL
    + """version_policy { latest { num_versions: 1 } }
input { name: "C" data_type: TYPE_FP32 dims: [ 2, -1 ] optional: true reshape { shape: [ 1, 2, -1 ] } }
output { name: "D" data_type: TYPE_STRING dims: -1 }
dynamic_batching {
preferred_batch_size: [ 2, 4 ]
max_queue_delay_microseconds: 100
preserve_ordering: true
priority_levels: 1
default_priority_level: 1
default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 1000 max_queue_size: 8 }
priority_queue_policy { key: 1 value { timeout_action: DELAY max_queue_size: 4 } }
}
parameters { key: "k" value { string_value: "v" } }
response_cache { enable: false }
model_transaction_policy { decoupled: false }
optimization { priority: PRIORITY_MAX input_pinned_memory { enable: true } }
model_warmup {
name: "w"
batch_size: 1
count: 1
inputs { key: "A" value { data_type: TYPE_INT32 dims: 1 zero_data: true } }
}
batch_input { kind: BATCH_ITEM_SHAPE target_name: "N" data_type: TYPE_FP32 source_input: "C" }
"""
)
STATEFUL = (
    MODEL
    + """sequence_batching {
max_sequence_idle_microseconds: 1000
oldest { max_candidate_sequences: 4 preferred_batch_size: 4 }
control_input { name: "S" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } }
control_input { name: "I" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
state {
input_name: "i"
output_name: "o"
data_type: TYPE_INT32
dims: 2
initial_state { name: "z" data_type: TYPE_INT32 dims: 2 zero_data: true }
}
}
"""
)
ENUMS = [
    [name for enum in enums for name in enum.keys()]  # noqa: SIM118 - a wrapper, no dict
    for enums in (
        (pb.DataType,),
        (pb.ModelInstanceGroup.Kind,),
        (pb.ModelSequenceBatching.Control.Kind,),
        (pb.BatchInput.Kind,),
        (pb.ModelQueuePolicy.TimeoutAction,),
    )
]
NUMBERS = ["-1", "0", "1", "2", "3", "4", "8", "9", "17"]


def mutate(text: str, dice: random.Random) -> str:
    """The text with one or two random changes."""
    lines = _split(text)
    for _ in range(dice.choice([1, 1, 2])):
        change = dice.choice([_drop, _repeat, _swap, _number, _number, _number, _enum, _enum, _name, _flag])
        change(lines, dice)
    return "\n".join(lines) + "\n"


def _split(text: str) -> list[str]:
    """One field on each line."""
    text = re.sub(r"([{}])", r"\n\1\n", text)
    text = re.sub(r"(\S)\s+(?=[a-z_0-9]+:)", r"\1\n", text)
    lines: list[str] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line == "{":
            lines[-1] += " {"
        else:
            lines.append(line)
    return lines


def _drop(lines: list[str], dice: random.Random) -> None:
    """A field goes, with all that is in it."""
    start = dice.randrange(len(lines))
    if lines[start] == "}":
        return
    end = _end(lines, start)
    del lines[start:end]


def _repeat(lines: list[str], dice: random.Random) -> None:
    start = dice.randrange(len(lines))
    if lines[start] != "}":
        end = _end(lines, start)
        lines[end:end] = lines[start:end]


def _swap(lines: list[str], dice: random.Random) -> None:
    one, other = dice.randrange(len(lines)), dice.randrange(len(lines))
    if "{" not in lines[one] + lines[other] and "}" not in (lines[one], lines[other]):
        lines[one], lines[other] = lines[other], lines[one]


def _end(lines: list[str], start: int) -> int:
    depth = 0
    for number in range(start, len(lines)):
        depth += lines[number].count("{") - lines[number].count("}")
        if depth == 0:
            return number + 1
    return len(lines)


def _replace(lines: list[str], dice: random.Random, pattern: str, choose: list[str]) -> None:
    places = [(number, match) for number, line in enumerate(lines) for match in re.finditer(pattern, line)]
    if places:
        number, match = dice.choice(places)
        new = dice.choice(choose)
        if lines[number].startswith("count:") and new not in ("-1", "0", "1", "2"):
            return
        lines[number] = lines[number][: match.start()] + new + lines[number][match.end() :]


def _number(lines: list[str], dice: random.Random) -> None:
    _replace(lines, dice, r"(?<![\w\"])-?\d+\b", NUMBERS)


def _enum(lines: list[str], dice: random.Random) -> None:
    names = dice.choice(ENUMS)
    _replace(lines, dice, r"\b(" + "|".join(names) + r")\b", [*names, "TYPE_FLOAT", "7"])


def _name(lines: list[str], dice: random.Random) -> None:
    _replace(lines, dice, r'"[^"]*"', ['"A"', '"B"', '"C"', '"x"', '"t"', '""', '"python"'])


def _flag(lines: list[str], dice: random.Random) -> None:
    _replace(lines, dice, r"\b(true|false)\b", ["true", "false", "1", "yes"])


def mutant(seed: int) -> Files:
    """A repository whose loaded model, `~m`, or one of its steps is changed at random."""
    dice = random.Random(seed)
    kind = dice.choice(["rich", "rich", "stateful", "ensemble", "ensemble", "step"])
    if kind in ("rich", "stateful"):
        return {"~m/config.pbtxt": mutate(RICH if kind == "rich" else STATEFUL, dice), "~m/1/model.py": CODE}
    step = dice.choice([MODEL, DECOUPLED])
    files: Files = {"~m/config.pbtxt": ENSEMBLE, "~m/1/.keep": ""}
    for name in ("~a", "~b"):
        files |= {f"{name}/config.pbtxt": step if name == "~a" else MODEL, f"{name}/1/model.py": CODE}
    target = "~m/config.pbtxt" if kind == "ensemble" else f"{dice.choice(['~a', '~b'])}/config.pbtxt"
    files[target] = mutate(str(files[target]), dice)
    return files
