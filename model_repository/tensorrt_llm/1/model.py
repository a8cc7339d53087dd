"""The `reference` runtime's Triton model: NVIDIA's `tensorrt_llm` tensors, executed on the CPU from a checkpoint.

Triton's side only; the work is done by trtkit, which must be installed where the server runs. `execute` hands requests
to the worker's thread and returns at once, so requests that arrive later still join the running batch. This needs
Triton 24.06 or newer, where models that are not decoupled may answer through a response sender too.

Parameters in config.pbtxt (empty or an unfilled "${...}" means the default):
    checkpoint_dir            TRT-LLM checkpoint; relative to the folder of this version
    end_ids                   token ids that end an answer, separated by commas; default none
    exclude_input_in_output   "true" leaves the prompt out of answers that are not streamed; default "false"
    max_seq_len               most tokens of prompt and output; default what the model was made for; no more than that
                              where positions are learned (GPT-2, OPT)
    torch_threads             threads of one operation; default 1 for a small model, torch's choice for others
`max_batch_size` is the number of requests that run at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from trtkit.errors import InputError, TrtkitError
from trtkit.repository.models.reference import wire
from trtkit.repository.models.reference.inflight import Progress
from trtkit.repository.models.reference.parameters import Parameters
from trtkit.repository.models.reference.worker import Code, Worker

SMALL = 50_000_000
"""Parameters below which several threads per operation lose: each operation takes microseconds, and threads that wait
for each other at its end stand still whenever the server or a client has the core."""


class TritonPythonModel:
    """The interface that Triton's python backend expects."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the checkpoint and starts the worker."""
        import torch

        from trtkit.checkpoint import open_checkpoint
        from trtkit.convert.readback import load_transformers_model

        config = json.loads(args["model_config"])
        parameters = Parameters.of(config)
        if config["max_batch_size"] < 1:
            raise InputError("config.pbtxt: max_batch_size is 0", "set how many requests may run at a time")
        version = Path(args["model_repository"]) / args["model_version"]
        folder = version / parameters.text("checkpoint_dir", need=True)
        longest = parameters.longest_sequence(open_checkpoint(folder).config)
        model = load_transformers_model(folder)
        small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
        if threads := parameters.integer("torch_threads") or (1 if small else None):
            torch.set_num_threads(threads)
        self.limits = wire.Limits(
            vocab_size=model.config.vocab_size,
            max_seq_len=longest,
            end_ids=parameters.integers("end_ids"),
            exclude_input_in_output=parameters.flag("exclude_input_in_output"),
            decoupled=pb_utils.using_decoupled_model_transaction_policy(config),
        )
        self.worker = Worker(model, config["max_batch_size"], pb_utils.Logger.log_error)

    def execute(self, requests: list[Any]) -> None:
        """Reads the requests and queues them. A wrong one is answered at once and leaves the others alone."""
        for request in requests:
            reply = Reply(request)
            try:
                self._accept(request, reply)
            except TrtkitError as error:
                reply.failed("; ".join(part for part in (error.cause, error.fix) if part), "INVALID_ARG")
            except Exception as error:
                reply.failed(f"the request cannot be read: {type(error).__name__}: {error}", "INTERNAL")

    def finalize(self) -> None:
        """Stops the worker; requests that still run get an error."""
        if hasattr(self, "worker"):  # not after a failed initialize
            self.worker.close()

    def _accept(self, request: Any, reply: Reply) -> None:
        given = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in wire.INPUTS)
        inputs = {name: tensor.as_numpy() for name, tensor in given if tensor is not None}
        name = request.request_id()
        if wire.wants_stop(inputs):
            if not name:
                raise InputError("stop: the request has no id", "send the id of the request to stop")
            self.worker.stop(name)
            reply.send(wire.tensors([[]], [0], [0.0], [[]], 0), last=True)
            return
        ask = wire.read_request(inputs, self.limits)
        reply.expect(ask, self.limits.decoupled)
        self.worker.submit(reply, ask.generations, name)


class Reply:
    """The answers to one request: the worker's client.

    A stream has one response per token, a decoupled model one per row of the batch otherwise, and a model that is not
    decoupled exactly one. The final flag comes with the last response. When an end id ends a stream, that response has
    no token: a flag without data would not get through an ensemble.
    """

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._wanted = set(request.requested_output_names())
        self._ask: wire.Ask
        self._left = 0
        self._decoupled = False

    def expect(self, ask: wire.Ask, decoupled: bool) -> None:
        """What the answers will be like."""
        self._ask = ask
        self._left = len(ask.generations)
        self._decoupled = decoupled

    def progressed(self, progress: Progress) -> None:
        generation, ask = progress.generation, self._ask
        self._left -= generation.done
        last = self._left == 0
        if ask.streaming:
            index = ask.generations.index(generation)
            self.send(wire.token_tensors(generation, index, progress.token), last=last)
        elif generation.done and (self._decoupled or last):
            rows = [generation] if self._decoupled else ask.generations
            index = ask.generations.index(rows[0])
            self.send(wire.answer_tensors(rows, index, exclude_input=ask.exclude_input, pad_id=ask.pad_id), last=last)

    def failed(self, message: str, code: Code) -> None:
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        self._respond(pb_utils.InferenceResponse(error=error), last=True)

    def is_cancelled(self) -> bool:
        cancelled: bool = self._sender.is_cancelled()
        return cancelled

    def send(self, arrays: dict[str, wire.Array], *, last: bool) -> None:
        """One response, with the outputs that were asked for."""
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items() if name in self._wanted]
        self._respond(pb_utils.InferenceResponse(tensors), last=last)

    def _respond(self, response: Any, *, last: bool) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)
