"""The engine against recorded training steps of the published code."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.support.golden_steps import RECORDED, VARIANTS, assert_recorded
from tests.support.processes import ROOT, run

STAGES = (0, 2)  # the others compute the same: tests/distributed/test_state.py


@pytest.fixture(scope="module")
def engine_runs() -> dict[tuple[int, str], list[dict[str, Any]]]:
    command = [sys.executable, "-m", "tests.support.golden_steps", *map(str, STAGES)]
    result = run(command, cwd=ROOT, timeout_s=200)
    assert result.code == 0, result.text
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"stage"')]
    return {(line["stage"], line["variant"]): line["steps"] for line in lines}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_takes_the_published_steps(
    engine_runs: dict[tuple[int, str], list[dict[str, Any]]], name: str, stage: int
) -> None:
    steps = engine_runs[stage, name]
    assert len(steps) == len(RECORDED[name])
    for index, step in enumerate(steps):
        assert_recorded(name, index, step)
