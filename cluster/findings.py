"""What a look at machines has found: lines of `rddm doctor`, each with its remedy where something is wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    remedy: set when something is wrong; is_warning: a job may run all the same.
    """

    name: str
    value: str
    remedy: str = ""
    is_warning: bool = False

    @property
    def is_problem(self) -> bool:
        """Whether a job had better not start."""
        return bool(self.remedy) and not self.is_warning

    @property
    def mark(self) -> str:
        if not self.remedy:
            return "ok"
        return "warn" if self.is_warning else "FIX"
