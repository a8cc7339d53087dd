"""The engine is another model of the same server, `tensorrt_llm`, called by BLS with NVIDIA's tensors.

Every running sequence has a thread, which reads its responses. A sequence that nobody wants any more is ended by a
request with the same id and `stop`, which NVIDIA's C++ backend, its python model and the reference runtime obey at
once, before the first token too. (The response iterator's own cancel() exists since Triton 25.04 only, not before the
first response, and the C++ backend looks for it every 100 ms.)

The server keeps a stream's responses until its end, so they hold no tensor that is not needed.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from ..engine import Code, Job, RequestError, Step
from ..mailbox import Mailbox

Array = npt.NDArray[Any]

ENTRANCES = 24
"""Calls that may wait for their first response at the same time. Each holds one of the 32 threads that Triton has for
BLS (`--backend-config=python,thread-pool-size`), and a stop must always find a free one."""
STOP_AGAIN_S = 0.05
"""A stop that was faster than the request it should stop does nothing, so it is repeated until the sequence ends."""
WATCH_S = 1.0
SILENCE_S = 60.0
LAST_WORD_S = 5.0
"""A stream is given up after so long without a response; the second is for one that nobody wants any more. Servers
before 25.02 lose an error that is not a call's first response, and its iterator would wait for ever."""
CLOSE_S = 10.0
KEPT_S = 5.0
"""How long responses are kept after the last one. Servers before 25.01 let go of them in a thread of their own, without
Python's lock, which corrupts Python's memory if that is the last reference; so the last one has to be here."""


class _Run:
    """A sequence that the other model generates."""

    def __init__(self, job: Job, name: str) -> None:
        self.job = job
        self.name = name  # the request's id
        self.tokens = 0
        self.sent = False
        self.heard: float | None = None  # when the last response came; None before the first
        self.thread: threading.Thread | None = None
        self.over = False  # nothing more will come from the model


class Engine:
    """Sequences of the model `tensorrt_llm`.

    Args:
        parameters: `model_name`; optionally `max_seq_len`, and `model_release`, the TensorRT-LLM version that gives the
            model its tensors' names, empty for the newest.
        slots: sequences that run at once, and threads; others wait in order of arrival.
    """

    def __init__(self, parameters: dict[str, str], *, slots: int) -> None:
        self._model = parameters.get("model_name", "tensorrt_llm")
        self._release = tuple(int(part) for part in parameters.get("model_release", "9999.0").split(".")[:2])
        longest = parameters.get("max_seq_len")
        self.vocab_size: int | None = None
        self.max_seq_len: int | None = int(longest) if longest else None
        self._id = uuid.uuid4().hex
        self._slots = slots
        self._mail = Mailbox()
        self._todo: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._stops: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._entrance = threading.Semaphore(ENTRANCES)
        self._lock = threading.Lock()
        self._runs: dict[int, _Run] = {}  # under the lock, as the threads
        self._threads: list[threading.Thread] = []
        self._kept: deque[tuple[float, Any]] = deque()
        self._stopper = threading.Thread(target=self._send_stops, name="stops", daemon=True)
        self._stopper.start()

    def check(self, job: Job) -> None:
        if self._release < (0, 19) and (job.sampling.guide_type or job.sampling.guide):
            raise RequestError("guided decoding came with TensorRT-LLM 0.19", "UNSUPPORTED")

    def submit(self, job: Job) -> None:
        run = _Run(job, f"{self._id}-{job.key}")
        self._mail.open(job.key)
        with self._lock:
            self._runs[job.key] = run
            if len(self._threads) < min(self._slots, len(self._runs)):
                self._start_thread()
        self._todo.put(run)

    def cancel(self, key: int) -> None:
        self._mail.close(key)
        with self._lock:
            run = self._runs.get(key)
        if run is not None:
            self._stops.put(run)

    def step(self, timeout_s: float) -> list[Step]:
        return self._mail.take(timeout_s)

    def close(self) -> None:
        with self._lock:
            keys, threads = list(self._runs), list(self._threads)
        for key in keys:
            self.cancel(key)
        for _ in threads:
            self._todo.put(None)
        limit = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(limit - time.monotonic(), 0))
        self._stops.put(None)
        self._stopper.join(1)

    # The threads of the sequences.

    def _work(self) -> None:
        while (run := self._todo.get()) is not None:
            run.thread = threading.current_thread()
            try:
                if self._mail.is_open(run.job.key):
                    self._follow(run)
            except Exception as error:
                self._mail.put(Step(run.job.key, error=f"{self._model}: {error}"))
            if not self._end(run):
                return  # it was given up; another thread has its place

    def _end(self, run: _Run) -> bool:
        with self._lock:
            ended, run.over = not run.over, True
            if ended:
                del self._runs[run.job.key]
        return ended

    def _give_up_silent(self) -> None:
        """Ends sequences of which nothing has been heard for too long. Their threads wait on, in the server's code."""
        now = time.monotonic()
        with self._lock:
            running = [run for run in self._runs.values() if run.heard is not None]
        for run in running:
            wanted = self._mail.is_open(run.job.key)
            if now - (run.heard or now) < (SILENCE_S if wanted else LAST_WORD_S):
                continue
            error = f"{self._model} has not answered for {SILENCE_S:g} s"
            self._mail.put(Step(run.job.key, error=error, code="UNAVAILABLE"))
            if self._end(run):
                with self._lock:
                    if run.thread in self._threads:
                        self._threads.remove(run.thread)
                        self._start_thread()
                # By a thread of its own: a model that says nothing may not answer this either.
                threading.Thread(target=self._stop, args=(run,), name="last-stop", daemon=True).start()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="bls", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self, run: _Run) -> None:
        job = run.job
        outputs = ["output_ids", "sequence_length", *(["output_log_probs"] if job.log_probs else [])]
        request = self._request(run.name, self._inputs(job), outputs)
        with self._entrance:
            if not self._mail.is_open(job.key):
                return  # cancelled while it waited
            run.sent = True
            responses = request.exec(decoupled=True)  # comes back with the first response
        # The loop goes on after an end: an iterator that is not used up waits for its last response anyway.
        for response in responses:
            run.heard = time.monotonic()
            if response.has_error():
                code = _CODES.get(response.error().code(), "INTERNAL")
                self._mail.put(Step(job.key, error=f"{self._model}: {response.error().message()}", code=code))
            elif self._mail.is_open(job.key) and response.output_tensors():
                self._mail.put(_read(run, response))
        self._keep(responses)
        if run.heard is None:  # two calls that fail at once get one error between them (Triton 2.51)
            self._mail.put(Step(job.key, error=f"{self._model}: no response"))
        # A model does not say why it ended; all that is left is an end id that it kept to itself.
        self._mail.put(Step(job.key, finish="stop"))

    def _keep(self, responses: Any) -> None:
        now = time.monotonic()
        with self._lock:
            self._kept.append((now, responses))
            gone = []
            while self._kept[0][0] < now - KEPT_S:
                gone.append(self._kept.popleft())

    def _request(self, name: str, inputs: dict[str, Array], outputs: list[str]) -> Any:
        return pb_utils.InferenceRequest(
            model_name=self._model,
            request_id=name,
            requested_output_names=outputs,
            inputs=[pb_utils.Tensor(tensor, array) for tensor, array in inputs.items()],
        )

    def _inputs(self, job: Job) -> dict[str, Array]:
        asked, new = job.sampling, self._release >= (0, 20)
        greedy = asked.temperature == 0
        inputs = {
            "input_ids": np.array([job.prompt], dtype=np.int32),
            "input_lengths": _one(len(job.prompt), np.int32),
            "request_output_len": _one(job.max_tokens, np.int32),
            "streaming": _one(job.streams, np.bool_),
            "end_id": _one(job.end_ids[0] if job.end_ids else -1, np.int32),
        }
        if job.end_ids[1:]:  # the model knows one; words of one token do for the others
            inputs["stop_words_list"] = _words([[number] for number in job.end_ids[1:]])
        if job.bad_words:
            inputs["bad_words_list"] = _words(job.bad_words)
        optional: tuple[tuple[str, Any, type[np.generic]], ...] = (
            ("exclude_input_in_output", True if self._release >= (0, 14) else None, np.bool_),
            ("return_log_probs", job.log_probs or None, np.bool_),
            ("temperature", None if greedy else asked.temperature, np.float32),
            ("runtime_top_k", 1 if greedy else asked.top_k, np.int32),
            ("runtime_top_p", None if greedy else asked.top_p or None, np.float32),
            ("repetition_penalty", asked.repetition_penalty, np.float32),
            ("presence_penalty", asked.presence_penalty, np.float32),
            ("frequency_penalty", asked.frequency_penalty, np.float32),
            ("min_tokens" if new else "min_length", asked.min_tokens, np.int32),
            ("seed" if new else "random_seed", asked.seed, np.uint64),
            ("lora_task_id", asked.lora_task_id, np.uint64),
            ("guided_decoding_guide_type", asked.guide_type and asked.guide_type.encode(), np.object_),
            ("guided_decoding_guide", asked.guide and asked.guide.encode(), np.object_),
        )
        inputs |= {name: _one(value, dtype) for name, value, dtype in optional if value is not None}
        return inputs

    # The thread that stops.

    def _send_stops(self) -> None:
        stopping: list[_Run] = []
        again = 0.0
        while True:
            now = time.monotonic()
            try:
                run = self._stops.get(timeout=max(again - now, 0.001) if stopping else WATCH_S)
                if run is None:
                    return
                if self._stop(run):
                    stopping.append(run)
            except queue.Empty:
                stopping = [run for run in stopping if not run.over and self._stop(run)]
                again = time.monotonic() + STOP_AGAIN_S
                self._give_up_silent()

    def _stop(self, run: _Run) -> bool:
        """Ends the work of the model; whether it is worth another try."""
        if not run.sent:
            return not run.over
        inputs = {
            "input_ids": np.array([run.job.prompt[:1]], dtype=np.int32),
            "input_lengths": _one(1, np.int32),
            "request_output_len": _one(1, np.int32),
            "stop": _one(True, np.bool_),
        }
        try:
            responses = self._request(run.name, inputs, ["sequence_length"]).exec(decoupled=True)
            wrong = [response.error().message() for response in responses if response.has_error()]
            self._keep(responses)
        except Exception as error:
            wrong = [repr(error)]
        if wrong and not run.over:
            pb_utils.Logger.log_error(f"{self._model} does not stop a sequence: {wrong[0]}")
        return not wrong


_CODES: dict[int, Code] = {
    getattr(pb_utils.TritonError, code): code for code in ("INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "CANCELLED")
}


def _one(value: Any, dtype: type[np.generic]) -> Array:
    return np.array([[value]], dtype=dtype)


def _words(words: Sequence[Sequence[int]]) -> Array:
    """Words `[1, 2, n]`: the ids of all, and where each ends, padded with -1."""
    ids = [number for word in words for number in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    return np.array([[ids, ends + [-1] * (len(ids) - len(ends))]], dtype=np.int32)


def _read(run: _Run, response: Any) -> Step:
    """What a response tells; an end id, if the model gives it, ends the sequence and is taken off."""
    arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    count = int(arrays["sequence_length"].reshape(-1)[0])
    tokens: list[int] = arrays["output_ids"][0, 0, :count].tolist()
    ended = next((place for place, token in enumerate(tokens) if token in run.job.end_ids), None)
    tokens = tokens[:ended]
    log_probs: list[float] = []
    if run.job.log_probs and tokens:
        row: list[float] = arrays["output_log_probs"][0, 0].tolist()
        # NVIDIA's backend repeats those of the tokens before, the reference runtime does not.
        log_probs = row[run.tokens :][: len(tokens)] if len(row) >= run.tokens + len(tokens) else row[: len(tokens)]
    run.tokens += len(tokens)
    finish = "stop" if ended is not None else "length" if run.tokens >= run.job.max_tokens else ""
    return Step(run.job.key, tokens, finish, log_probs=log_probs)
