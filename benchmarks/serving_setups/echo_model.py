"""A stand-in for an engine in the `tensorrt_llm` model: gives the prompt back, token by token, without computing.

It keeps the tensors and the order of the real one (batched requests, one response per token and request in turn, the
final flag with the last), so what is measured around it is the serving path alone. With the parameter `step_ms` a
round over all running requests takes at least that long.
"""

import json
import queue
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

ONE = np.ones((1, 1), dtype=np.int32)
ZERO = np.zeros((1, 1), dtype=np.int32)
ZERO_F = np.zeros((1, 1), dtype=np.float32)
ZERO_FF = np.zeros((1, 1, 1), dtype=np.float32)
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.step_s = float(parameters.get("step_ms", {}).get("string_value", "0")) / 1000
        self.waiting = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def execute(self, requests):
        for request in requests:
            given = {
                name: pb_utils.get_input_tensor_by_name(request, name)
                for name in ("input_ids", "input_lengths", "request_output_len", "streaming")
            }
            given = {name: tensor.as_numpy().reshape(-1) for name, tensor in given.items() if tensor is not None}
            prompt = given["input_ids"][: int(given["input_lengths"][0])]
            tokens = np.resize(prompt, int(given["request_output_len"][0])).astype(np.int32)
            streams = "streaming" in given and bool(given["streaming"][0])
            self.waiting.put((request.get_response_sender(), set(request.requested_output_names()), tokens, streams))

    def run(self):
        running = []
        while True:
            while not running or not self.waiting.empty():
                item = self.waiting.get()
                if item is None:
                    return
                running.append([*item, 0])
            started = time.monotonic()
            for entry in running:
                sender, wanted, tokens, streams, place = entry
                end = place + 1 if streams else len(tokens)
                self.send(sender, wanted, tokens[place:end], end == len(tokens))
                entry[4] = end
            running = [entry for entry in running if entry[4] < len(entry[2])]
            if self.step_s:
                time.sleep(max(0, started + self.step_s - time.monotonic()))

    def send(self, sender, wanted, tokens, last):
        size = len(tokens)
        tensors = [
            pb_utils.Tensor("output_ids", tokens.reshape(1, 1, size)),
            pb_utils.Tensor("sequence_length", ONE if size == 1 else np.array([[size]], dtype=np.int32)),
        ]
        for name, value in (
            ("cum_log_probs", ZERO_F),
            ("output_log_probs", ZERO_FF),
            ("batch_index", ZERO),
            ("sequence_index", ZERO),
        ):
            if name in wanted:
                tensors.append(pb_utils.Tensor(name, value))
        sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if last else 0)

    def finalize(self):
        self.waiting.put(None)
        self.thread.join(5)
