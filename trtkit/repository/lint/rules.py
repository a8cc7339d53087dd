"""The table of lint rules.

Every error rule is something a real Triton server refuses, hangs on or serves wrongly; those about config.pbtxt were
checked on a server 2.51 and follow triton-inference-server/core, src/model_config_utils.cc. The server often says no
more than "failed to poll from model repository", so a finding names the file, the line and the way out.
"""

from __future__ import annotations

from typing import NamedTuple

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
    "TK109": Rule("error", "unknown platform, or one that does not go with the backend"),
    "TK110": Rule("warning", "neither backend nor platform is given, so the server guesses from the files"),
    # one model: batching and instances
    "TK111": Rule("error", "max_batch_size is negative"),
    "TK112": Rule("error", "a preferred batch size is not between 1 and max_batch_size"),
    "TK113": Rule("warning", "dynamic batching has no effect with max_batch_size 0"),
    "TK114": Rule("warning", "ragged input has no effect with max_batch_size 0"),
    "TK115": Rule("error", "instances that are not on GPUs, with a list of GPUs"),
    "TK116": Rule("warning", "priority levels stall the dynamic batcher"),
    "TK117": Rule("error", "a priority level out of range"),
    "TK118": Rule("error", "response cache on a decoupled model or with sequence batching"),
    "TK119": Rule("warning", "ordering or sequence batching on a decoupled model"),
    "TK120": Rule("error", "neither backend nor platform is given, and the files do not tell"),
    # one model: tensors
    "TK121": Rule("error", "a tensor has no name, type or dims, or a dim of 0"),
    "TK122": Rule("warning", "a tensor name is given twice"),
    "TK123": Rule("error", "reshape changes the number of elements"),
    "TK124": Rule("warning", "warmup names an unknown input, which the server ignores"),
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
    "TK139": Rule("error", "a parameter that the server or the python backend reads has a value that it refuses"),
    "TK140": Rule("warning", "a parameter that the tensorrtllm backend does not know"),
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
    "TK157": Rule("error", "an ensemble without steps, or a step without a model, input_map or output_map"),
    # one model: scheduling, in detail
    "TK161": Rule("error", "preserve_ordering with several priority levels or with delayed timeouts"),
    "TK162": Rule("error", "a control of sequence batching is wrong"),
    "TK163": Rule("error", "a size or a state of sequence batching is wrong"),
    "TK164": Rule("error", "batch_input or batch_output is wrong"),
    "TK165": Rule("warning", "a response cache without a cache in the server"),
    "TK166": Rule("warning", "an instance count below 1, which the server takes for its default"),
    "TK167": Rule("error", "KIND_GPU instances where there is no such GPU"),
    "TK168": Rule("error", "an instance group with a TensorRT profile, and the model is no TensorRT plan"),
    "TK169": Rule("warning", "two rate limiter resources of one name, one of them global"),
    "TK170": Rule("error", "a field that the release does not know"),
    "TK171": Rule("warning", "the version policy names a version that is not there"),
    "TK172": Rule("warning", "a folder that looks like a version but is not served"),
    "TK173": Rule("error", "a warmup request that the model would refuse"),
    "TK174": Rule("error", "a tensor option that only TensorRT has, or an image format without 3 dims"),
    "TK175": Rule("error", "a backend or runtime that the server does not have"),
    "TK176": Rule("error", "a file that config.pbtxt names is missing"),
    "TK177": Rule("error", "model_metrics lacks a family or buckets"),
    "TK178": Rule("error", "a repository agent that the server lacks, or a list of none, which ends the server"),
    "TK179": Rule("error", "the number of an enum stands for nothing"),
    # security
    "TK181": Rule("warning", "code that comes with a model is trusted (trust_remote_code)"),
    "TK182": Rule("error", "whoever reaches the server may load models, which is to run code"),
    "TK183": Rule("warning", "code in the repository can be changed by other users"),
    "TK184": Rule("warning", "the backend folder can be changed by other users"),
    "TK185": Rule("warning", "a tokenizer or adapter is read from outside the repository"),
    # the engine or checkpoint
    "TK201": Rule("error", "max_batch_size is greater than the engine's"),
    "TK202": Rule("error", "max_beam_width is greater than the engine's"),
    "TK203": Rule("error", "the number of GPUs or participants is not the number of ranks"),
    "TK204": Rule("error", "the engine was compiled by another TensorRT-LLM than the release has"),
    "TK205": Rule("warning", "a limit of tokens or lengths does not fit the engine's"),
    "TK206": Rule("error", "KV-cache reuse or chunked context, and the engine has no paged context attention"),
    "TK207": Rule("error", "the release has no TensorRT engine backend any more"),
    # the tokenizer
    "TK211": Rule("error", "the tokenizer makes ids that the model does not have"),
    "TK212": Rule("warning", "end ids of generation_config are not among the parameter's"),
    "TK213": Rule("warning", "chat messages are taken, and the tokenizer has no chat template"),
    "TK214": Rule("warning", "prompts get the begin-of-sequence token twice"),
    # models of one runtime
    "TK221": Rule("error", "model.yaml of an llmapi model is missing or names no model"),
    "TK222": Rule("error", "decoupled or max_batch_size of config.pbtxt and model.yaml differ"),
    "TK223": Rule("error", "instances and gpu_device_ids of an llmapi model differ"),
    "TK231": Rule("error", "model.json of a vLLM model is missing or names no model"),
    "TK232": Rule("error", "a vLLM model without tensors or decoupled, and the server does not complete configs"),
    "TK233": Rule("error", "a vLLM model on several GPUs is not KIND_MODEL"),
    "TK241": Rule("error", "the ONNX graph cannot be read"),
    "TK242": Rule("error", "a tensor of config.pbtxt is not that of the ONNX graph"),
    "TK243": Rule("error", "max_batch_size is set, and the ONNX graph has no batch dimension"),
}


def finding(rule: str, place: str, cause: str, fix: str, *, severity: Severity | None = None) -> Finding:
    """A finding of a rule in the table; `severity` where the circumstances make it another than the rule's."""
    return Finding(rule, severity or RULES[rule].severity, place, cause, fix)
