"""How far a conversion came: `progress.json` in its unpublished folder, from which an interrupted one goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trtkit.checkpoint import rank_file
from trtkit.convert.cast import CastReport
from trtkit.convert.follow import FileRecord, NonFinite
from trtkit.convert.stream import Written
from trtkit.store import atomic_write

PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a conversion came, kept in `progress.json` of its folder.

    Ranks are finished when they are on the disk. The units (layers) of the running stage are only known to be in the
    page cache, so after a restart of the machine that stage begins anew.

    Attributes:
        finished: rank -> record of its file.
        report, non_finite: account of the finished ranks.
        stage, unit, unit_report: the last unit written in a running stage, and the stage's account so far.
    """

    folder: Path
    finished: dict[int, FileRecord] = field(default_factory=dict)
    report: CastReport = field(default_factory=CastReport)
    non_finite: list[NonFinite] = field(default_factory=list)
    stage: int = -1
    unit: int = -1
    unit_report: CastReport = field(default_factory=CastReport)

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """The progress noted in a folder; none where nothing (readable) is."""
        try:
            noted = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            progress = cls(
                folder,
                {int(rank): FileRecord(**record) for rank, record in noted["finished"].items()},
                CastReport(**noted["report"]),
                [NonFinite(found["tensor"], tuple(found["index"]), found["value"]) for found in noted["non_finite"]],
            )
            if noted["boot"] and noted["boot"] == boot_id():
                progress.stage, progress.unit = noted["stage"], noted["unit"]
                progress.unit_report = CastReport(**noted["unit_report"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(folder)
        for rank, record in progress.finished.items():
            if not has_size(folder / rank_file(rank), record.bytes):
                return cls(folder)  # somebody was at the files: nothing of the account holds
        return progress

    def start(self, stage: int) -> tuple[int, CastReport]:
        """The last unit of a stage that is written (-1: none), and the account of what was."""
        return (self.unit, self.unit_report) if stage == self.stage else (-1, CastReport())

    def note(self, stage: int, unit: int, report: CastReport) -> None:
        self.stage, self.unit, self.unit_report = stage, unit, report
        self._write(sync=False)

    def finish(self, written: Written, *, sync: bool = True) -> None:
        """Notes ranks that are on the disk."""
        self.finished |= written.files
        self.report.add(written.report)
        first = {found.tensor: found for found in self.non_finite}
        for found in written.non_finite:
            if found.tensor not in first or found.index < first[found.tensor].index:
                first[found.tensor] = found
        self.non_finite = sorted(first.values(), key=lambda found: found.tensor)
        self.stage, self.unit, self.unit_report = -1, -1, CastReport()
        self._write(sync=sync)

    def _write(self, *, sync: bool) -> None:
        noted = {
            "boot": boot_id(),
            "finished": {rank: asdict(record) for rank, record in self.finished.items()},
            "report": asdict(self.report),
            "non_finite": [asdict(found) for found in self.non_finite],
            "stage": self.stage,
            "unit": self.unit,
            "unit_report": asdict(self.unit_report),
        }
        atomic_write(self.folder / PROGRESS, json.dumps(noted), sync=sync)


def boot_id() -> str:
    """Tells this start of the machine from others; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
