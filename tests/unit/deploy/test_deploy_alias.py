"""The plain second name of a model repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtkit.deploy import alias
from trtkit.errors import LacksError


@pytest.mark.parametrize("name", ["sp ace", "é", "a'b", "a;b", "$x", "a\nb"])
def test_a_name_without_surprises_that_goes_again(tmp_path: Path, name: str) -> None:
    repository = tmp_path / name
    repository.mkdir()
    (repository / "kept").touch()
    link = alias.make(repository, tmp_path)
    assert link is not None
    assert re.fullmatch(r"[A-Za-z0-9_./+-]+", str(link))
    assert link.resolve() == repository.resolve()
    assert link.parent.stat().st_mode & 0o777 == 0o700
    alias.remove(str(link))
    alias.remove(str(link))
    assert list(tmp_path.iterdir()) == [repository]
    assert (repository / "kept").exists()


def test_a_plain_path_needs_none(tmp_path: Path) -> None:
    assert alias.make(tmp_path, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, plain = tmp_path / "o dd", tmp_path / "tmp"
    odd.mkdir()
    plain.mkdir()
    monkeypatch.setattr(alias.tempfile, "gettempdir", lambda: str(plain))
    link = alias.make(odd, odd)
    assert link is not None
    assert link.parent.parent == plain
    monkeypatch.setattr(alias.tempfile, "gettempdir", lambda: str(odd))
    with pytest.raises(LacksError, match="nor through a link"):
        alias.make(odd, odd)
    monkeypatch.setattr(alias.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    with pytest.raises(LacksError, match=r"cannot link to .* No such file"):
        alias.make(odd, odd)


def test_only_what_it_made_is_removed(tmp_path: Path) -> None:
    (tmp_path / "trtkit-alias-x" / "models").mkdir(parents=True)  # no link
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "models").symlink_to(tmp_path)  # no folder of ours
    for path in (None, "", str(tmp_path), *map(str, tmp_path.glob("*/models"))):
        alias.remove(path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == [
        "other/models",
        "trtkit-alias-x/models",
    ]
