"""The teacher's answers, stored: a bank of replayable views, or answers that somebody else computed."""

from __future__ import annotations

from .answers import Answers
from .build import build_bank
from .coding import Coding
from .external import ExternalAnswers, load_answers
from .store import BankKey, ViewBank, fingerprint, list_banks, open_bank

__all__ = [
    "Answers",
    "BankKey",
    "Coding",
    "ExternalAnswers",
    "ViewBank",
    "build_bank",
    "fingerprint",
    "list_banks",
    "load_answers",
    "open_bank",
]
