"""Findings of the doctor on the console."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.findings import Finding
from rddm_dist.cli.progress import say


def show_findings(findings: Sequence[Finding], *, ready: str) -> int:
    """Print one line for each, its remedy below it, and the verdict, `ready` where all is well.   -> exit code"""
    marks = max(len(finding.mark) for finding in findings)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        say(f"{finding.mark:>{max(marks, 3)}}  {finding.name:<{width}}  {finding.value}")
        if finding.remedy:
            say(f"{' ' * (max(marks, 3) + 2 + width)}  -> {finding.remedy}")
    problems = sum(finding.is_problem for finding in findings)
    say(f"{problems} thing(s) to fix" if problems else ready)
    return 2 if problems else 0
