"""Every preset trains, previews and exports, at toy size, through the one entry point."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest

from tests.support.processes import ROOT, run

PRESETS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
LIMIT_S = 560  # about 90 s of one core; a machine shared with others takes several times as long
pytestmark = pytest.mark.timeout(LIMIT_S + 40)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Preset -> what became of it. One process trains all: starting one takes longer than two steps."""
    folder = tmp_path_factory.mktemp("presets")
    command = [sys.executable, "-m", "tests.support.preset_probe", str(folder), *map(str, PRESETS)]
    result = run(command, cwd=ROOT, timeout_s=LIMIT_S)
    assert result.code == 0, result.text
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"preset"')]
    return {line["preset"]: line for line in lines}


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS])
def test_a_preset_trains_two_steps(outcomes: dict[str, dict[str, Any]], preset: str) -> None:
    outcome = outcomes[preset]
    assert (outcome["status"], outcome["step"]) == ("done", 2)
    assert len(outcome["losses"]) == 2 and all(math.isfinite(loss) and loss > 0 for loss in outcome["losses"])
    assert outcome["previews"] == ["step-00000002.png"]
    assert outcome["objective"] in ("pred_res", "pred_noise", "pred_res_noise")
