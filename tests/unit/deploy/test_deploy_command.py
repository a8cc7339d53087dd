"""The arguments of tritonserver, alone and under MPI."""

from __future__ import annotations

import pytest

from trtkit.deploy.command import mpi_command, server_arguments

OPTIONS = {
    "host": "127.0.0.1",
    "http_port": 1,
    "grpc_port": 2,
    "metrics_port": 3,
    "exit_timeout_s": 4,
    "shm_prefix": "p_",
}


def test_one_rank() -> None:
    arguments = server_arguments("/models", **OPTIONS, backend_directory="/b", cache_directory="/c")
    assert mpi_command("tritonserver", arguments, world_size=1, shm_prefix="p_") == ["tritonserver", *arguments]
    assert {
        "--model-repository=/models",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
        "--http-port=1",
        "--grpc-port=2",
        "--metrics-port=3",
        "--exit-timeout-secs=4",
        "--backend-config=python,shm-region-prefix-name=p_",
        "--backend-directory=/b",
        "--cache-directory=/c",
    } <= set(arguments)
    assert len(arguments) == len(set(arguments))


def test_a_rank_each_and_one_that_answers() -> None:
    arguments = server_arguments("/models", **OPTIONS)
    command = mpi_command("tritonserver", arguments, world_size=3, shm_prefix="p_", llm_models=("llm", "draft"))
    assert command[:2] == ["mpirun", "--allow-run-as-root"]
    blocks = " ".join(command[2:]).split(" : ")
    assert len(blocks) == 3
    for rank, block in enumerate(blocks):
        words = block.split()
        assert words[:3] == ["-n", "1", "tritonserver"]
        assert f"--backend-config=python,shm-region-prefix-name=p_{rank}_" in words
        assert words.count("--model-repository=/models") == 1
        leads = rank == 0
        assert ("--model-control-mode=none" in words) == leads
        assert ("--http-port=1" in words) == leads
        assert ("--allow-grpc=false" in words) == (not leads)
        loaded = [word for word in words if word.startswith(("--load-model", "--model-control-mode=explicit"))]
        assert loaded == ([] if leads else ["--model-control-mode=explicit", "--load-model=llm", "--load-model=draft"])


@pytest.mark.parametrize(
    ("host", "http", "grpc"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("::1", "ipv6:::1", "[::1]"),
        ("::", "ipv6:::", "[::]"),
        ("localhost", "localhost", "localhost"),
    ],
)
def test_each_service_wants_ipv6_in_its_own_way(host: str, http: str, grpc: str) -> None:
    arguments = server_arguments("/models", **OPTIONS | {"host": host})
    given = dict(word.split("=", 1) for word in arguments if "-address=" in word)
    assert given == {"--http-address": http, "--grpc-address": grpc, "--metrics-address": http}
