"""The ensembles among the repositories of `lint_corpus`."""

from __future__ import annotations

from lint_cases import DECOUPLED, ENSEMBLE, MODEL, NO_PROTO, UNBATCHED, Case, ensemble, model

INPUT_X = 'input { name: "x" data_type: TYPE_INT32 dims: 1 }'
ENSEMBLES = [
    Case("ensemble", ensemble()),
    Case("absent model", ensemble("~b", "~nope"), "TK141", "not available or ambiguous"),
    Case("unknown step input", ensemble('key: "A"', 'key: "Z"'), "TK142", "non-existing input"),
    Case("unknown step output", ensemble('key: "B"', 'key: "Z"'), "TK142", "non-existing output"),
    Case(
        "required input unmapped",
        ensemble(a=MODEL + 'input { name: "C" data_type: TYPE_INT32 dims: 1 }'),
        "TK143",
        "is not mapped",
    ),
    Case(
        "optional input unmapped",
        ensemble(a=MODEL + 'input { name: "C" data_type: TYPE_INT32 dims: 1 optional: true }'),
    ),
    Case(
        "output of no step",
        ensemble(text=ENSEMBLE + 'output { name: "z" data_type: TYPE_INT32 dims: 1 }'),
        "TK144",
        "ensemble output",
    ),
    Case(
        "input of no step",
        ensemble(text=ENSEMBLE + 'input { name: "z" data_type: TYPE_INT32 dims: 1 }'),
        "TK145",
        "ensemble input",
    ),
    Case("nothing produces it", ensemble('key: "A" value: "t"', 'key: "A" value: "q"'), "TK146", "not connected"),
    Case(
        "nothing uses it",
        ensemble(
            'output_map { key: "B" value: "t" }',
            'output_map { key: "B" value: "t" } output_map { key: "C" value: "u" }',
            a=MODEL + 'output { name: "C" data_type: TYPE_INT32 dims: 1 }',
        ),
        "TK147",
        "is unused",
    ),
    Case("other type", ensemble("TYPE_INT32", "TYPE_FP32"), "TK148", "inconsistent data type"),
    Case("other shape", ensemble("dims: 1", "dims: 2"), "TK149", "inconsistent shape"),
    Case("any shape", ensemble("dims: 1", "dims: -1")),
    Case("one dim more", ensemble("dims: 1", "dims: [ 1, 1 ]"), "TK149", "inconsistent shape"),
    Case("unbatched step of equal dims", ensemble(b=UNBATCHED), "TK149"),
    Case("unbatched step with a batch dim", ensemble(b=UNBATCHED.replace("dims: 1", "dims: [ -1, 1 ]"))),
    Case(
        "consumers that differ behind any size",
        ensemble(
            "step {",
            'step { model_name: "~c" model_version: -1 input_map { key: "A" value: "t" } output_map { key: "B" '
            'value: "z" } } step {',
            a=MODEL.replace("dims: 1", "dims: -1"),
            text=ENSEMBLE + 'output { name: "z" data_type: TYPE_INT32 dims: 1 }',
            extra=model(MODEL.replace("dims: 1", "dims: 3", 1), "~c"),
        ),
        "TK149",
        "inconsistent shape",
    ),
    Case("ensemble 16, step 8", ensemble("8", "16"), "TK150", "allows maximum batch size 16"),
    Case("ensemble 0, step 8", ensemble("max_batch_size: 8\n", "")),
    Case("circle", ensemble('key: "A" value: "x"', 'key: "A" value: "y"'), "TK151", "is not used"),
    Case("an ensemble in itself", ensemble("~b", "~m"), "TK151", "circular dependency"),
    Case(
        "an ensemble in its step",
        ensemble(
            "~b",
            "~n",
            extra={
                "~n/config.pbtxt": ENSEMBLE.replace("~b", "~m")
                .replace('"A" value: "t"', '"x" value: "t"')
                .replace('"B" value: "y"', '"y" value: "y"'),
                "~n/1/.keep": "",
            },
        ),
        "TK151",
        "-> ... ->",
    ),
    Case(
        "an ensemble in an ensemble",
        ensemble(
            'model_name: "~b" model_version: -1 input_map { key: "A" value: "t" } output_map { key: "B" value: "y" }',
            'model_name: "~n" model_version: -1 input_map { key: "x" value: "t" } output_map { key: "y" value: "y" }',
            extra={"~n/config.pbtxt": ENSEMBLE, "~n/1/.keep": ""},
        ),
    ),
    Case(
        "instances of an ensemble",
        ensemble(text=ENSEMBLE + "instance_group { kind: KIND_CPU }"),
        "TK152",
        "instance group should not be",
    ),
    Case(
        "optimization of an ensemble", ensemble(text=ENSEMBLE + "optimization { }"), "TK152", "optimization should not"
    ),
    Case(
        "warmup of an ensemble", ensemble(text=ENSEMBLE + 'model_warmup { name: "w" }'), "TK152", "model_warmup can not"
    ),
    Case("batching of an ensemble", ensemble(text=ENSEMBLE + "dynamic_batching { }"), "TK103", NO_PROTO),
    Case("cache of an ensemble", ensemble(text=ENSEMBLE + "response_cache { enable: true }"), "TK165"),
    Case("no platform", ensemble('platform: "ensemble"\n', ""), "TK109", "Could not determine backend"),
    Case("other platform", ensemble('"ensemble"', '"onnxruntime_onnx"'), "TK109", "platform is not ensemble"),
    Case(
        "no steps",
        {"~m/config.pbtxt": 'platform: "ensemble" ensemble_scheduling { }', "~m/1/.keep": ""},
        "TK157",
        "must specify 'step'",
    ),
    Case(
        "no scheduling",
        {"~m/config.pbtxt": 'platform: "ensemble"', "~m/1/.keep": ""},
        "TK157",
        "ensemble scheduling must be set",
    ),
    Case(
        "no version of an ensemble",
        {k: v for k, v in ensemble().items() if k != "~m/1/.keep"},
        "TK106",
        "at least one version",
    ),
    Case("no model in a step", ensemble('model_name: "~b" ', ""), "TK157", "must specify 'model_name'"),
    Case("no input of a step", ensemble('input_map { key: "A" value: "t" } ', ""), "TK157", "must specify 'input_map'"),
    Case(
        "no output of a step", ensemble('output_map { key: "B" value: "y" } ', ""), "TK157", "must specify 'output_map'"
    ),
    Case("absent version of a step", ensemble("model_version: -1", "model_version: 7"), "TK155", "required version 7"),
    Case("version 1 of a step", ensemble("model_version: -1", "model_version: 1")),
    Case("no version of a step", ensemble("model_version: -1 ", ""), "TK155", "required version 0"),
    Case("a tensor produced twice", ensemble('"B" value: "y"', '"B" value: "t"'), "TK156", "only once"),
    Case(
        "a duplicate output that is mapped",
        ensemble(a=MODEL + 'output { name: "B" data_type: TYPE_INT32 dims: 1 }'),
        "TK156",
        "multiple outputs",
    ),
    Case(
        "a duplicate input that is mapped",
        ensemble(a=MODEL + 'input { name: "A" data_type: TYPE_INT32 dims: 1 }'),
        "TK122",
    ),
    Case("an input twice in an ensemble", ensemble(text=ENSEMBLE + INPUT_X), "TK122"),
    Case(
        "an output twice in an ensemble",
        ensemble(text=ENSEMBLE + INPUT_X.replace("input", "output").replace("x", "y")),
        "TK122",
    ),
    Case(
        "an input that a step produces",
        ensemble(text=ENSEMBLE + INPUT_X.replace("x", "t")),
        "TK156",
        but="each request gets an error, too",
    ),
    Case("decoupled", ensemble(a=DECOUPLED)),
    Case(
        "decoupled, then two instances",
        ensemble(a=DECOUPLED, b=MODEL.replace("count: 1", "count: 2")),
        "TK153",
        but="the pieces of a stream come in a wrong order",
    ),
    Case(
        "decoupled and from before",
        ensemble(
            'input_map { key: "A" value: "t" }',
            'input_map { key: "A" value: "t" } input_map { key: "C" value: "x" }',
            a=DECOUPLED,
            b=MODEL + 'input { name: "C" data_type: TYPE_INT32 dims: 1 }',
        ),
        "TK154",
        "different decoupled",
    ),
    Case(
        "outputs from before and behind",
        ensemble(
            text=ENSEMBLE.replace("output {", 'output { name: "t" data_type: TYPE_INT32 dims: 1 } output {', 1),
            b=DECOUPLED,
        ),
        "TK154",
        "different decoupled",
    ),
    Case(
        "max_inflight_requests",
        ensemble("ensemble_scheduling {", "ensemble_scheduling { max_inflight_requests: 4"),
        "TK170",
        NO_PROTO,
    ),
    Case("a step that is broken", ensemble(b=MODEL.replace("8", "-1")), "TK111", "not available or ambiguous"),
    Case("reshaped input", ensemble("dims: 1", "dims: [ 1, 1 ] reshape { shape: 1 }")),
    Case("input goes out", ensemble(text=ENSEMBLE + 'output { name: "x" data_type: TYPE_INT32 dims: 1 }')),
]
