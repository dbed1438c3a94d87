"""Every preset trains, previews and exports, at toy size, through the one entry point."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT, Finished, run

PRESETS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
LIMIT_S = 560  # about 50 s on two cores; a machine shared with others takes several times as long
pytestmark = pytest.mark.timeout(LIMIT_S + 40)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Preset -> what became of it. Two processes train all: starting one takes longer than two steps."""

    def train(presets: list[Path]) -> Finished:
        folder = tmp_path_factory.mktemp("presets")
        command = [sys.executable, "-m", "tests.support.preset_probe", str(folder), *map(str, presets)]
        return run(command, cwd=ROOT, timeout_s=LIMIT_S)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(train, (PRESETS[::2], PRESETS[1::2])))
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    lines = [line for result in results for line in result.stdout.splitlines() if line.startswith('{"preset"')]
    return {record["preset"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS])
def test_a_preset_trains_two_steps(outcomes: dict[str, dict[str, Any]], preset: str) -> None:
    outcome = outcomes[preset]
    assert (outcome["status"], outcome["step"]) == ("done", 2)
    assert len(outcome["losses"]) == 2 and all(math.isfinite(loss) and loss > 0 for loss in outcome["losses"])
    assert outcome["previews"] == ["step-00000002.png"]
    assert outcome["objective"] in ("pred_res", "pred_noise", "pred_res_noise")
