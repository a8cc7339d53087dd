"""Broken and odd model repositories, each with what a real Triton server (2.51) does and what the linter must say."""

from __future__ import annotations

from lint_cases import (
    A_ZERO,
    CODE,
    DECOUPLED,
    MODEL,
    NO_PROTO,
    START,
    UNBATCHED,
    Case,
    batching,
    changed,
    given,
    model,
    more,
    parameter,
    sequence,
    warmup,
)  # fmt: skip
from lint_corpus_ensembles import ENSEMBLES

FILES = [
    Case("good", model(MODEL)),
    Case("not unicode", model(b"# caf\xe9\n" + MODEL.encode())),
    Case("not unicode in a string", model(MODEL.encode() + b'parameters { key: "k" value { string_value: "\xe9" } }')),
    Case("byte order mark", model(b"\xef\xbb\xbf" + MODEL.encode()), "TK103", NO_PROTO),
    Case("unknown field", more("instance_groups { }"), "TK103", NO_PROTO),
    Case("unknown enum", changed("TYPE_INT32", "TYPE_INT"), "TK103", NO_PROTO),
    Case("placeholder in a number", changed("8", "${size}"), "TK103", NO_PROTO),
    Case("placeholder in a bool", more("model_transaction_policy { decoupled: ${d} }"), "TK103", NO_PROTO),
    Case("placeholder in a string", more(parameter("k", "${value}")), "TK104"),
    Case("two schedulers", more("dynamic_batching { } sequence_batching { }"), "TK103", NO_PROTO),
    Case("a field twice", more("max_batch_size: 4"), "TK103", NO_PROTO),
    Case("an open brace", more("dynamic_batching {"), "TK103", NO_PROTO),
    Case("a string without its end", more('name: "x'), "TK103", NO_PROTO),
    Case("other name", more('name: "other"'), "TK105", "unexpected directory name"),
    Case("own name", more('name: "~m"')),
    Case("no version", {"~m/config.pbtxt": MODEL, "~m/model.py": CODE}, "TK106", "at least one version"),
    Case("version v1", {"~m/config.pbtxt": MODEL, "~m/v1/model.py": CODE}, "TK106", "at least one version"),
    Case("version 01", {"~m/config.pbtxt": MODEL, "~m/01/model.py": CODE}, "TK106", "at least one version"),
    Case("version 0", {"~m/config.pbtxt": MODEL, "~m/0/model.py": CODE}),
    Case("version v2 beside 1", model(MODEL, **{"v2/model.py": CODE}), "TK172"),
    Case("an absent version", more("version_policy { specific { versions: 3 } }"), "TK106", "at least one version"),
    Case("an absent version beside one", more("version_policy { specific { versions: [ 1, 3 ] } }"), "TK171"),
    Case("latest 0", more("version_policy { latest { num_versions: 0 } }"), "TK106", "at least one version"),
    Case("all versions", more("version_policy { all { } }")),
    Case("an empty version policy", more("version_policy { }")),
    Case("no config", {"~m/1/model.py": CODE}, "TK102", "failed to open text file"),
    Case("an empty config", model(""), "TK110"),
    Case("no backend", changed('backend: "python"\n', ""), "TK110"),
    Case(
        "no backend and no file",
        {"~m/config.pbtxt": MODEL.replace('backend: "python"\n', ""), "~m/1/.keep": ""},
        "TK120",
        "Could not determine backend",
    ),
    Case("no backend and a file name", changed('backend: "python"', 'default_model_filename: "model.py"'), "TK110"),
    Case("unknown platform", changed("backend", "platform"), "TK109", "unexpected platform type"),
    Case("platform and backend python", more('platform: "anything"')),
    Case(
        "platform of another backend",
        changed('"python"', '"onnxruntime" platform: "pytorch_libtorch"'),
        "TK109",
        "'platform' and 'backend' pair",
    ),
    Case("unknown backend", changed('"python"', '"tensorrtllm"'), "TK175", "unable to find backend library"),
    Case("a runtime that is none", more('runtime: "libother.so"'), "TK175", "unable to find backend library"),
    Case("the runtime's own name", more('runtime: "libtriton_python.so"')),
    Case("ensemble platform with a backend", more('platform: "ensemble"'), "TK152", "empty backend type"),
    Case(
        "model_metrics",
        more('model_metrics { metric_control { metric_identifier { family: "f" } histogram_options { buckets: 1 } } }'),
        "TK170",
        NO_PROTO,
    ),
    Case("model_metrics without a family", more("model_metrics { metric_control { } }"), "TK177", NO_PROTO),
    Case("no model.py", {"~m/config.pbtxt": MODEL, "~m/1/.keep": ""}, "TK107", but="the load never ends"),
    Case("other file name", {**more('default_model_filename: "other.py"'), "~m/1/other.py": CODE}),
    Case("syntax error", model(MODEL, code="def f(:\n"), "TK108", "SyntaxError"),
    Case("no class", model(MODEL, code="import json\n"), "TK125", "TritonPythonModel"),
    Case("unknown module", model(MODEL, code="import no_such_module_x\n" + CODE), "TK127", "no_such_module_x"),
    Case(
        "labels",
        {
            **changed("TYPE_INT32 dims: 1 }\ninst", 'TYPE_INT32 dims: 1 label_filename: "l.txt" }\ninst'),
            "~m/l.txt": "one\n",
        },
    ),
    Case(
        "no labels",
        changed("TYPE_INT32 dims: 1 }\ninst", 'TYPE_INT32 dims: 1 label_filename: "l.txt" }\ninst'),
        "TK176",
        "failed to open text file",
    ),
]

SCHEDULING = [
    Case("max_batch_size -1", changed("8", "-1"), "TK111", "must be non-negative"),
    Case("batching", batching("preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100")),
    Case("batching without batches", batching("", UNBATCHED), "TK113"),
    Case("preferred 9 of 8", batching("preferred_batch_size: 9"), "TK112", "must be <= max batch size"),
    Case("preferred 0", batching("preferred_batch_size: 0"), "TK112", "must be positive"),
    Case("preferred 4 of 0", batching("preferred_batch_size: 4", UNBATCHED), "TK112", "must be <= max batch size"),
    Case("ragged without batches", changed("dims: 1", "dims: 1 allow_ragged_batch: true", UNBATCHED), "TK114"),
    Case("priorities", batching("priority_levels: 2 default_priority_level: 1"), "TK116"),
    Case(
        "default priority 3 of 2",
        batching("priority_levels: 2 default_priority_level: 3"),
        "TK117",
        "default priority level",
    ),
    Case("default priority of none", batching("default_priority_level: 3")),
    Case(
        "queue policy of level 3 of 2",
        batching(
            "priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value { max_queue_size: 1 } }"
        ),
        "TK117",
        "priority queue policy must have",
    ),
    Case("ordered", batching("preserve_ordering: true")),
    Case(
        "ordered with 1 priority",
        batching("preserve_ordering: true priority_levels: 1 default_priority_level: 1"),
        "TK116",
    ),
    Case(
        "ordered with 2 priorities",
        batching("preserve_ordering: true priority_levels: 2 default_priority_level: 1"),
        "TK161",
        "Only one priority level",
    ),
    Case(
        "ordered and delayed",
        batching(
            "preserve_ordering: true default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 }"
        ),
        "TK161",
        "DELAY as timeout action",
    ),
    Case(
        "ordered and delayed by 0", batching("preserve_ordering: true default_queue_policy { timeout_action: DELAY }")
    ),
    Case(
        "ordered and delayed for a level",
        batching(
            "preserve_ordering: true priority_levels: 1 default_priority_level: 1 priority_queue_policy { key: 1 "
            "value { timeout_action: DELAY default_timeout_microseconds: 5 } }"
        ),
        "TK161",
        "DELAY as timeout action",
    ),
    Case("ordered and decoupled", batching("preserve_ordering: true", DECOUPLED), "TK119"),
    Case("sequences and decoupled", sequence("", DECOUPLED), "TK119"),
    Case("cache", more("response_cache { enable: true }"), "TK165"),
    Case("cache and decoupled", more("response_cache { enable: true }", DECOUPLED), "TK118", "response cache"),
    Case(
        "cache and sequences", more("response_cache { enable: true } sequence_batching { }"), "TK118", "response cache"
    ),
    Case("cache off and decoupled", more("response_cache { enable: false }", DECOUPLED)),
    Case("count 0", changed("count: 1", "count: 0"), "TK166"),
    Case("count -1", changed("count: 1", "count: -1"), "TK166"),
    Case("no instance group", changed("instance_group { count: 1 kind: KIND_CPU }\n", "")),
    Case("instances of any kind", changed(" kind: KIND_CPU", "")),
    Case("KIND_AUTO with gpus", changed("kind: KIND_CPU", "gpus: 0"), "TK115", "specifies one or more GPUs"),
    Case("KIND_CPU with gpus", changed("KIND_CPU", "KIND_CPU gpus: 0"), "TK115", "specifies one or more GPUs"),
    Case("KIND_MODEL with gpus", changed("KIND_CPU", "KIND_MODEL gpus: 0"), "TK115", "specifies one or more GPUs"),
    Case("KIND_MODEL", changed("KIND_CPU", "KIND_MODEL")),
    Case("KIND_GPU", changed("KIND_CPU", "KIND_GPU"), "TK167", "no GPUs are available"),
    Case("KIND_GPU with gpus", changed("KIND_CPU", "KIND_GPU gpus: 0"), "TK167", "invalid or unsupported gpu id"),
    Case("profile", changed("KIND_CPU", 'KIND_CPU profile: "1"'), "TK168", "profile"),
    Case("passive", changed("KIND_CPU", "KIND_CPU passive: true")),
    Case("host policy", changed("KIND_CPU", 'KIND_CPU host_policy: "p"')),
    Case("secondary device", changed("KIND_CPU", "KIND_CPU secondary_devices { kind: KIND_NVDLA device_id: 0 }")),
    Case("rate limiter", changed("KIND_CPU", 'KIND_CPU rate_limiter { resources { name: "R" count: 1 } priority: 2 }')),
    Case(
        "a resource both ways",
        changed(
            "KIND_CPU",
            'KIND_CPU rate_limiter { resources { name: "R" count: 1 } resources { name: "R" global: true count: 1 } }',
        ),
        "TK169",
    ),
    Case("agent", more('model_repository_agents { agents { name: "no_such_agent" } }'), "TK178", "no_such_agent"),
    Case("no agents", more("model_repository_agents { }"), "TK178", but="it ends the server"),
    Case("operations", more('model_operations { op_library_filename: "none.so" }')),
    Case(
        "optimization",
        more(
            "optimization { input_pinned_memory { enable: false } execution_accelerators { "
            'cpu_execution_accelerator { name: "x" } } }'
        ),
    ),
    Case("tags", more('metric_tags { key: "a" value: "b" } cc_model_filenames { key: "7.5" value: "x" }')),
]

SEQUENCES = [
    Case("sequences", sequence("")),
    Case("sequences with a start", sequence('control_input { name: "S" ' + START + " }")),
    Case("control without a name", sequence("control_input { " + START + " }"), "TK162", "must have a name"),
    Case(
        "control tensor twice",
        sequence('control_input { name: "S" ' + START + ' } control_input { name: "S" }'),
        "TK162",
        "multiple control kinds",
    ),
    Case(
        "control twice",
        sequence('control_input { name: "S" ' + START + ' } control_input { name: "T" ' + START + " }"),
        "TK162",
        "specifies multiple",
    ),
    Case(
        "control without values",
        sequence('control_input { name: "S" control { kind: CONTROL_SEQUENCE_READY } }'),
        "TK162",
        "must specify either",
    ),
    Case(
        "control of one value",
        sequence('control_input { name: "S" control { kind: CONTROL_SEQUENCE_END fp32_false_true: 1 } }'),
        "TK162",
        "exactly 2 entries",
    ),
    Case(
        "control of two types",
        sequence(
            'control_input { name: "S" control { kind: CONTROL_SEQUENCE_START '
            "fp32_false_true: [ 0, 1 ] int32_false_true: [ 0, 1 ] } }"
        ),
        "TK162",
        "more than one",
    ),
    Case(
        "correlation id",
        sequence('control_input { name: "C" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }'),
    ),
    Case(
        "correlation id of a wrong type",
        sequence('control_input { name: "C" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 } }'),
        "TK162",
        "unexpected data type",
    ),
    Case(
        "correlation id with values",
        sequence(
            'control_input { name: "C" control { kind: CONTROL_SEQUENCE_CORRID '
            "int32_false_true: [ 0, 1 ] data_type: TYPE_INT32 } }"
        ),
        "TK162",
        "must not specify either",
    ),
    Case(
        "oldest 9 of 8",
        sequence("oldest { max_candidate_sequences: 4 preferred_batch_size: 9 }"),
        "TK112",
        "must be <= max batch",
    ),
    Case(
        "oldest 0",
        sequence("oldest { max_candidate_sequences: 4 preferred_batch_size: 0 }"),
        "TK112",
        "must be positive",
    ),
    Case("oldest", sequence("oldest { max_candidate_sequences: 4 preferred_batch_size: 4 }")),
    Case("slots 2", sequence("direct { minimum_slot_utilization: 2 }"), "TK163", "minimum slot utilization"),
    Case("slots 0.5", sequence("direct { minimum_slot_utilization: 0.5 }")),
    Case(
        "state",
        sequence(
            'state { input_name: "I" output_name: "O" data_type: TYPE_INT32 dims: 1 initial_state { '
            'name: "i" data_type: TYPE_INT32 dims: 1 zero_data: true } }'
        ),
    ),
    Case(
        "state of another type",
        sequence(
            'state { input_name: "I" output_name: "O" data_type: TYPE_INT32 dims: 1 '
            'initial_state { name: "i" data_type: TYPE_FP32 dims: 1 zero_data: true } }'
        ),
        "TK163",
        "does not match the state data type",
    ),
    Case(
        "state without data",
        sequence(
            'state { input_name: "I" output_name: "O" data_type: TYPE_INT32 dims: 1 '
            'initial_state { name: "i" data_type: TYPE_INT32 dims: 1 } }'
        ),
        "TK163",
        "state_data set",
    ),
    Case(
        "state without its file",
        sequence(
            'state { input_name: "I" output_name: "O" data_type: TYPE_INT32 dims: 1 '
            'initial_state { name: "i" data_type: TYPE_INT32 dims: 1 data_file: "f" } }'
        ),
        "TK163",
        "failed to",
    ),
    Case(
        "state of any size",
        sequence(
            'state { input_name: "I" output_name: "O" data_type: TYPE_INT32 dims: -1 '
            'initial_state { name: "i" data_type: TYPE_INT32 dims: -1 zero_data: true } }'
        ),
        "TK163",
        "variable dimensions",
    ),
    Case(
        "batch input",
        more('batch_input { kind: BATCH_ELEMENT_COUNT target_name: "N" data_type: TYPE_FP32 source_input: "A" }'),
    ),
    Case(
        "batch input of nothing",
        more('batch_input { kind: BATCH_ELEMENT_COUNT target_name: "N" data_type: TYPE_FP32 }'),
        "TK164",
        "expects 1 source input",
    ),
    Case(
        "batch input of an unknown",
        more('batch_input { kind: BATCH_ITEM_SHAPE target_name: "N" data_type: TYPE_FP32 source_input: "Z" }'),
        "TK164",
        "unknown source input",
    ),
    Case(
        "batch input of a wrong type",
        more('batch_input { kind: BATCH_ELEMENT_COUNT target_name: "N" data_type: TYPE_INT64 source_input: "A" }'),
        "TK164",
        "TYPE_INT32 or",
    ),
    Case(
        "batch output", more('batch_output { target_name: "B" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "A" }')
    ),
    Case(
        "batch output to an unknown",
        more('batch_output { target_name: "Z" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "A" }'),
        "TK164",
        "unknown target output",
    ),
    Case(
        "batch output twice",
        more('batch_output { target_name: [ "B", "B" ] kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "A" }'),
        "TK164",
        "only be specified once",
    ),
]

TENSORS = [
    Case("no name", changed('name: "A" ', ""), "TK121", "must specify 'name'"),
    Case("no type", changed("data_type: TYPE_INT32 ", ""), "TK121", "must specify 'data_type'"),
    Case("no dims", changed(" dims: 1", ""), "TK121", "must specify 'dims'"),
    Case("dims 0", changed("dims: 1", "dims: 0"), "TK121", "integer >= 1, or -1"),
    Case("dims -2", changed("dims: 1", "dims: -2"), "TK121", "integer >= 1, or -1"),
    Case("dims -1", changed("dims: 1", "dims: -1")),
    Case("no tensors", model('backend: "python"')),
    Case("an input twice", more('input { name: "A" data_type: TYPE_INT32 dims: 1 }'), "TK122"),
    Case("an output twice", more('output { name: "B" data_type: TYPE_FP32 dims: 2 }'), "TK122"),
    Case("input and output of one name", changed('"B"', '"A"')),
    Case("reshape", changed("dims: 1", "dims: 4 reshape { shape: [ 2, 2 ] }")),
    Case("reshape to nothing", changed("dims: 1", "dims: 1 reshape { }")),
    Case("reshape 2 to nothing", changed("dims: 1", "dims: 2 reshape { }"), "TK123", "has different size"),
    Case("reshape any to nothing", changed("dims: 1", "dims: -1 reshape { }"), "TK123", "has different size"),
    Case(
        "reshape to nothing without batches",
        changed("dims: 1", "dims: 1 reshape { }", UNBATCHED),
        "TK123",
        "cannot have empty reshape",
    ),
    Case("reshape 1 to 2", changed("dims: 1", "dims: 1 reshape { shape: 2 }"), "TK123", "has different size"),
    Case("reshape to 0", changed("dims: 1", "dims: 1 reshape { shape: 0 }"), "TK123", "reshape dimensions must be"),
    Case("reshape around any", changed("dims: 1", "dims: [ 2, 4, -1, 6 ] reshape { shape: [ 8, -1, 1, 6 ] }")),
    Case(
        "reshape across any",
        changed("dims: 1", "dims: [ 2, -1, 6 ] reshape { shape: [ 6, -1, 2 ] }"),
        "TK123",
        "has different size",
    ),
    Case("reshape any to 3", changed("dims: 1", "dims: -1 reshape { shape: 3 }"), "TK123", "has different size"),
    Case(
        "reshape one any to two",
        changed("dims: 1", "dims: -1 reshape { shape: [ -1, -1 ] }"),
        "TK123",
        "variable-size dimensions",
    ),
    Case("image format", changed("dims: 1", "dims: 1 format: FORMAT_NCHW"), "TK174", "require 3 dims"),
    Case("image format of 3", changed("dims: 1", "dims: [ 3, 4, 4 ] format: FORMAT_NHWC")),
    Case("shape tensor", changed("dims: 1", "dims: 1 is_shape_tensor: true"), "TK174", "shape tensors"),
    Case("non-linear", changed("dims: 1", "dims: [ 1, 1, 1 ] is_non_linear_format_io: true"), "TK174", "Non-linear"),
    Case("warmup", warmup(A_ZERO)),
    Case("warmup of an unknown", warmup(A_ZERO + given("Z", "data_type: TYPE_INT32 dims: 1 zero_data: true")), "TK124"),
    Case(
        "warmup without an input",
        warmup(given("Z", "data_type: TYPE_INT32 dims: 1 zero_data: true")),
        "TK173",
        "missing required input",
    ),
    Case(
        "warmup of an input without a name",
        warmup(A_ZERO + given("", "data_type: TYPE_INT32 dims: 1 zero_data: true")),
        "TK173",
        but="the load never ends",
    ),
    Case("warmup of a decoupled model", warmup(A_ZERO, DECOUPLED)),
    Case("warmup without inputs", warmup(""), "TK173", "missing required input"),
    Case(
        "warmup of another type",
        warmup(given("A", "data_type: TYPE_FP32 dims: 1 zero_data: true")),
        "TK173",
        "data-type is 'FP32'",
    ),
    Case(
        "warmup of other dims",
        warmup(given("A", "data_type: TYPE_INT32 dims: 2 zero_data: true")),
        "TK173",
        "unexpected shape",
    ),
    Case(
        "warmup of more dims",
        warmup(given("A", "data_type: TYPE_INT32 dims: [ 1, 1 ] zero_data: true")),
        "TK173",
        "unexpected shape",
    ),
    Case(
        "warmup of any size",
        warmup(given("A", "data_type: TYPE_INT32 dims: -1 zero_data: true")),
        "TK173",
        "variable-size dimensions",
    ),
    Case("warmup without data", warmup(given("A", "data_type: TYPE_INT32 dims: 1")), "TK173", "input_data_type set"),
    Case(
        "warmup without its file",
        warmup(given("A", 'data_type: TYPE_INT32 dims: 1 input_data_file: "f"')),
        "TK173",
        "warmup",
    ),
    Case(
        "warmup from a short file",
        warmup(given("A", 'data_type: TYPE_INT32 dims: 1 input_data_file: "f"'), **{"warmup/f": b"xy"}),
        "TK173",
        "bytes",
    ),
    Case(
        "warmup from a file",
        warmup(given("A", 'data_type: TYPE_INT32 dims: 1 input_data_file: "f"'), **{"warmup/f": b"\0\0\0\0"}),
    ),
    Case("warmup of no batch", warmup("").copy() | {"~m/config.pbtxt": MODEL + 'model_warmup { name: "w" }'}),
    Case(
        "warmup of an optional input",
        model(MODEL.replace("dims: 1", "dims: 1 optional: true", 1) + 'model_warmup { name: "w" batch_size: 1 }'),
        "TK173",
        "request has 0 inputs",
    ),
    Case("FORCE_CPU_ONLY_INPUT_TENSORS", more(parameter("FORCE_CPU_ONLY_INPUT_TENSORS", "no"))),
    Case(
        "FORCE_CPU_ONLY_INPUT_TENSORS of true",
        more(parameter("FORCE_CPU_ONLY_INPUT_TENSORS", "true")),
        "TK139",
        "FORCE_CPU_ONLY_INPUT_TENSORS",
    ),
    Case(
        "a batch strategy that is missing",
        more(parameter("TRITON_BATCH_STRATEGY_PATH", "none.so")),
        "TK139",
        "Batching library path not found",
    ),
    Case(
        "an environment that is missing",
        more(parameter("EXECUTION_ENV_PATH", "none.tar.gz")),
        "TK139",
        "Failed to get the canonical path",
    ),
]

NUMBERS = [
    Case("type 99", changed("TYPE_INT32", "99"), "TK179"),
    Case("format 9", changed("dims: 1", "dims: 1 format: 9"), "TK179"),
    Case("timeout action 9", batching("default_queue_policy { timeout_action: 9 }"), "TK179"),
    Case("priority 9", more("optimization { priority: 9 }"), "TK179"),
    Case("type 8", changed("TYPE_INT32", "8")),
    Case("kind 9", changed("KIND_CPU", "9"), "TK179", "unexpected kind"),
    Case("control 9", sequence('control_input { name: "S" control { kind: 9 } }'), "TK179"),
    Case(
        "batch input 9",
        more('batch_input { kind: 9 target_name: "N" data_type: TYPE_FP32 source_input: "A" }'),
        "TK179",
        "unknown batch input kind",
    ),
    Case(
        "batch output 9",
        more('batch_output { target_name: "B" kind: 9 source_input: "A" }'),
        "TK179",
        "unknown batch output kind",
    ),
]

CORPUS = [*FILES, *SCHEDULING, *SEQUENCES, *TENSORS, *NUMBERS, *ENSEMBLES]
