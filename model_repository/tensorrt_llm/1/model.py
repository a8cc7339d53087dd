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
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from trtkit.errors import InputError, TrtkitError
from trtkit.repository.models.reference import wire
from trtkit.repository.models.reference.inflight import Progress
from trtkit.repository.models.reference.loading import load_checkpoint
from trtkit.repository.models.reference.parameters import Parameters
from trtkit.repository.models.reference.worker import Code, Counts, Worker
from trtkit.repository.models.serving.metrics import Metrics

REQUESTS = "trtkit_reference_requests_total"
TOKENS = "trtkit_reference_generated_tokens_total"
CANCELLED = "trtkit_reference_cancelled_requests_total"
RUNNING = "trtkit_reference_running_sequences"
WAITING = "trtkit_reference_waiting_requests"
COUNTERS = {
    REQUESTS: "Requests answered to their end",
    TOKENS: "Tokens generated, for unfinished requests too",
    CANCELLED: "Requests that were stopped or whose client went away",
}
GAUGES = {RUNNING: "Sequences that are being generated", WAITING: "Requests that wait for a slot"}


class TritonPythonModel:
    """The interface that Triton's python backend expects."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the checkpoint and starts the worker.

        Raises:
            InputError: a parameter or the checkpoint is wrong; cause and fix on one line.
        """
        try:
            self._start(args)
        except TrtkitError as error:
            # Raised here, so that the server's log says no more than this line and where it comes from.
            raise InputError(_line(error)) from None

    def execute(self, requests: list[Any]) -> None:
        """Reads the requests and queues them. A wrong one is answered at once and leaves the others alone."""
        for request in requests:
            reply = Reply(request)
            try:
                self._accept(request, reply)
            except TrtkitError as error:
                reply.failed(_line(error), "INVALID_ARG")
            except Exception as error:
                reply.failed(f"the request cannot be read: {type(error).__name__}: {error}", "INTERNAL")

    def finalize(self) -> None:
        """Stops the worker; requests that still run get an error."""
        if hasattr(self, "worker"):  # not after a failed initialize
            self.worker.close()

    def _start(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = Parameters.of(config)
        if config["max_batch_size"] < 1:
            raise InputError("config.pbtxt: max_batch_size is 0", "set how many requests may run at a time")
        loaded = load_checkpoint(parameters, Path(args["model_repository"]) / args["model_version"])
        self.limits = wire.Limits(
            vocab_size=loaded.vocab_size,
            max_seq_len=loaded.max_seq_len,
            end_ids=parameters.integers("end_ids"),
            exclude_input_in_output=parameters.flag("exclude_input_in_output"),
            decoupled=pb_utils.using_decoupled_model_transaction_policy(config),
        )
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self.metrics = Metrics(labels, counters=COUNTERS, gauges=GAUGES)
        self.worker = Worker(loaded.model, config["max_batch_size"], pb_utils.Logger.log_error, self._count)

    def _count(self, counts: Counts) -> None:
        """In the worker's thread, after each step."""
        self.metrics.values.update(
            {
                REQUESTS: counts.requests,
                TOKENS: counts.tokens,
                CANCELLED: counts.cancelled,
                RUNNING: counts.running,
                WAITING: counts.waiting,
            }
        )
        self.metrics.report(time.monotonic())

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
        if code == "CANCELLED" and self._decoupled:
            # An empty end, as NVIDIA's backend gives. Servers before 25.02 lose an error that is not the first response
            # to a BLS call, and whoever made the call would wait for ever.
            self.send(wire.tensors([[]], [0], [0.0], [[]], 0), last=True)
            return
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


def _line(error: TrtkitError) -> str:
    return "; ".join(part for part in (error.cause, error.fix) if part)
