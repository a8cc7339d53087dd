"""Every command in README.md, run in order, has the exit code and the output that the README shows.

Numbers, table borders and padding may differ; words may not. After a change of output,
`TRTKIT_UPDATE_README=1 python -m pytest tests/integration/test_readme.py` writes the new output into README.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SHOWN_ROOT = "/home/you/trtkit"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
# Lines that depend on the machine's speed or on timing.
VOLATILE = re.compile(
    r"^(\S+: )?(warning|info) TK8|^ *fix: |requests/s|in flight|^(starting|loading|opening)|load test"
    r"|^ *(closed|open)\b"
    r"|signal-to-noise|^│ [\d.]+ +│ [\d.e-]+ +│"  # which linears are worst, and how formats can be mixed
)

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that looks like a checkout; deployments that a failed run left are stopped."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "build_configs"):
        (folder / name).symlink_to(ROOT / name)
    yield folder
    run("trtkit deploy down --all", folder)


def run(command: str, folder: Path) -> tuple[int, str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRTKIT_STATE_DIR": str(folder / "state"),
    }
    done = subprocess.run(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    text = done.stdout.replace(str(ROOT), SHOWN_ROOT).replace(str(folder), SHOWN_ROOT)
    return done.returncode, "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def commands(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output shown below it."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2].strip("\n")) for part in parts]


def words(output: str) -> set[str]:
    """Lines without numbers, borders and padding."""
    lines = set()
    for line in output.splitlines():
        if VOLATILE.search(line):
            continue
        plain = re.sub(r"\b[0-9a-f]{20}\b|[\d,.]+", "#", re.sub(r"[━┏┓┗┛┳┻╇┡┩┃│└┘┴─┌┐┬]+", " ", line))
        lines.add(" ".join(plain.split()))
    return lines - {"", "#"}


def test_readme_shows_what_happens(workdir: Path) -> None:
    text = README.read_text()
    blocks = [commands(match) for match in BLOCK.findall(text)]
    assert sum(map(len, blocks)) > 15
    new_blocks, wrong = [], []
    for block in blocks:
        outputs = []
        for command, shown in block:
            code, output = run(command, workdir)
            outputs.append(f"$ {command}\n{output}\n" if output else f"$ {command}\n")
            expected = 2 if re.search(r"^error:", shown or output, re.MULTILINE) else 0
            missing = words(shown) - words(output)
            if code != expected or missing:
                wrong.append(f"$ {command}\nexit code {code}; missing: {sorted(missing)}\n{output}")
        new_blocks.append("```console\n" + "\n".join(outputs) + "```")
    if os.environ.get("TRTKIT_UPDATE_README"):
        remaining = iter(new_blocks)
        README.write_text(BLOCK.sub(lambda match: next(remaining), text))
        return
    assert not wrong, "\n\n".join(wrong)


def test_python_examples_run(workdir: Path) -> None:
    library = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", library], cwd=workdir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (workdir / "out" / "library-checkpoint" / "rank1.safetensors").is_file()
