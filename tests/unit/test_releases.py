"""The table of releases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from trtkit import releases
from trtkit.config import DeployConfig
from trtkit.errors import InputError


def test_the_table_is_sound() -> None:
    found = releases.load()
    tags = [release.tag for release in found]
    assert tags == sorted(tags, reverse=True)
    assert len(tags) == len(set(tags)) >= 27
    for release in found:
        assert re.fullmatch(r"2[4-9]\.(0[1-9]|1[0-2])", release.tag)
        assert release.image == f"nvcr.io/nvidia/tritonserver:{release.tag}-trtllm-python-py3"
        for version in (release.tensorrt_llm, release.tensorrt, release.cuda, release.driver, release.python):
            assert re.fullmatch(r"\d+\.\d+(\.\w+)*", version), (release.tag, version)


@pytest.mark.parametrize("column", ["tensorrt_llm", "cuda", "driver", "python"])
def test_newer_releases_hold_nothing_older(column: str) -> None:
    def numbers(release: releases.Release) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", getattr(release, column))]

    found = list(releases.load())
    for newer, older in pairwise(found):
        assert numbers(newer) >= numbers(older), (newer.tag, older.tag)


def test_the_default_release_is_known_and_builds_engines() -> None:
    release = releases.get(DeployConfig().release)
    assert (release.tensorrt_llm, release.has_engine_builder) == ("1.2.1", True)


@pytest.mark.parametrize(
    ("version", "builds"), [("0.9.0", True), ("1.2.1", True), ("1.0.3.2510", True), ("1.3.0rc1", False), ("2.0", False)]
)
def test_engines_ended_with_1_3(version: str, builds: bool) -> None:
    assert replace(releases.get("26.07"), tensorrt_llm=version).has_engine_builder == builds


def test_an_unknown_release_names_near_ones() -> None:
    with pytest.raises(InputError, match=r"no release '26\.7'") as unknown:
        releases.get("26.7")
    assert "26.07" in unknown.value.fix


def trtkit(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", "releases", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command() -> None:
    rows = json.loads(trtkit("--json").stdout)
    assert [row["tag"] for row in rows] == [release.tag for release in releases.load()]
    one = json.loads(trtkit("25.06", "--json").stdout)
    assert (one["tensorrt_llm"], one["has_engine_builder"]) == ("0.20.0", True)
    assert "10.10.0.31" in trtkit("25.06").stdout
    wrong = trtkit("25.6")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "25.06" in wrong.stderr
