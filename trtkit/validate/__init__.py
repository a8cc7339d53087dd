"""Validate: does a served model keep its contract, and does it say what its source says?"""

from __future__ import annotations

from trtkit.validate.results import CheckResult, Subject
from trtkit.validate.run import CHECKS, run_checks, subject_of

__all__ = ["CHECKS", "CheckResult", "Subject", "run_checks", "subject_of"]
