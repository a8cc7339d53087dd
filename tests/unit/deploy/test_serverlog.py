"""What is read out of a server's log. The samples are like those of tritonserver 2.51 on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtkit.deploy import serverlog

NOISE = """W1121 03:10:00.400000 20670 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory, pinned"
E1121 03:10:00.419835 20670 server.cc:241] "CudaDriverHelper has not been initialized."
I1121 03:10:00.520000 20670 model_lifecycle.cc:472] "loading: m:1"
Error: Failed to initialize NVML
W1121 03:10:00.620000 20670 metrics.cc:798] "DCGM unable to start: DCGM initialization error"
"""
EXCEPTION = """E1121 03:10:01.1 1 backend_model.cc:692] "ERROR: Failed to create: ValueError: no\\n\\nAt:\\n  m(4)\\n"
E1121 03:10:01.2 1 model_lifecycle.cc:642] "failed to load 'm' version 1: Internal: ValueError: no\\n\\nAt:\\n  m(4)\\n"
+-------+---------+-----------------------------------------+
| Model | Version | Status                                  |
+-------+---------+-----------------------------------------+
| m     | 1       | UNAVAILABLE: Internal: ValueError: no   |
|       |         |                                         |
|       |         | At:                                     |
|       |         |   m(4)                                  |
| n     | 1       | READY                                   |
+-------+---------+-----------------------------------------+
error: creating server: Internal - failed to load all models
"""
PARSER = """[libprotobuf ERROR /tmp/x/text_format.cc:337] Error parsing inference.ModelConfig: 6:9: no field named "x".
E1121 03:10:01.0 1 model_repository_manager.cc:1460] "Poll failed for model directory 'm': failed to read text proto"
error: creating server: Internal - failed to load all models
"""
TAKEN = """error: creating http server: Unavailable - Socket '127.0.0.1:18201' already in use
"""
TRACEBACK = """E1121 03:10:01.0 1 pb_stub.cc:402] "An error occurred while trying to load:
Traceback (most recent call last):
  File "m.py", line 1, in <module>
KeyError: 'x'"
I1121 03:10:02.0 1 server.cc:1] "something else"
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", []),
        (NOISE, []),
        (NOISE + EXCEPTION, ["m: Internal: ValueError: no At: m(4)"]),
        (
            NOISE + PARSER,
            [
                'Error parsing inference.ModelConfig: 6:9: no field named "x".',
                "Poll failed for model directory 'm': failed to read text proto",
            ],
        ),
        (TAKEN, ["creating http server: Unavailable - Socket '127.0.0.1:18201' already in use"]),
        (
            TRACEBACK,
            [
                "An error occurred while trying to load: Traceback (most recent call last): "
                "File \"m.py\", line 1, in <module> KeyError: 'x'"
            ],
        ),
    ],
    ids=["empty", "noise", "exception", "parser", "taken", "traceback"],
)
def test_reasons(text: str, said: list[str]) -> None:
    assert serverlog.reasons(text) == said


def test_long_reasons_keep_both_ends() -> None:
    (said,) = serverlog.reasons(f"error: begin {'x' * 5000} end\n")
    assert said.startswith("begin x")
    assert said.endswith("x end")
    assert len(said) < 600


def test_port_taken_is_an_error_of_the_server_and_not_any_line() -> None:
    assert serverlog.port_taken(NOISE + TAKEN)
    assert not serverlog.port_taken('I1121 03:10:01.0 1 a.cc:1] "name already in use"\n' + EXCEPTION)


def test_progress_of_loading() -> None:
    text = NOISE + "".join(
        f'I1121 03:10:01.0 1 a.cc:1] "{line}"\n' for line in ("loading: a.b:2", "successfully loaded 'm'")
    )
    assert serverlog.loading(text) == serverlog.Loading(("m", "a.b"), ("m",))


def test_ends_of_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert serverlog.read_end(log) == ""
    assert serverlog.tail(log, 5) == []
    log.write_bytes(b"\xff" + "".join(f"line {number}\n" for number in range(100)).encode())
    assert serverlog.tail(log, 2) == ["line 98", "line 99"]
    assert serverlog.read_end(log, 15) == "ine 98\nline 99\n"


def test_a_stub_that_died() -> None:
    text = 'I1121 04:45:56.966700 11335 model_lifecycle.cc:472] "loading: a:1"\n'
    assert serverlog.died(text) is None
    text += "terminate called after throwing an instance of 'std::invalid_argument'\n  what():  stol\n"
    assert serverlog.died(text) == "terminated by std::invalid_argument: stol"


def test_an_address_that_is_none_is_not_a_taken_port() -> None:
    taken = "E1121 04:46:15.774537 1 main.cc:245] \"failed to start GRPC: Socket '::1:3' already in use \"\n"
    assert serverlog.port_taken(taken)
    assert not serverlog.port_taken(
        "E1121 04:46:15.77 1 chttp2_server.cc:1060] UNKNOWN:Name or service not known\n" + taken
    )
