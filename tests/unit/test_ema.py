"""The EMA rule against the recorded trace of the published training, and as a function of the step alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rddm_dist.config import EmaSection
from rddm_dist.training.ema import ema_decay, make_ema
from rddm_dist.training.engine import Piece

TRACE = Path(__file__).resolve().parents[1] / "golden" / "ema.json"


def test_the_published_rule_is_reproduced() -> None:
    piece = Piece("w", 0, torch.zeros(1), {})
    ema = make_ema([piece])
    settings = EmaSection()
    recorded = {int(step): value for step, value, _ in json.loads(TRACE.read_text())["rows"]}
    for step in range(1, max(recorded) + 1):
        piece.weight.fill_(float(step))
        ema.update(step, settings)
        if step in recorded:
            assert float(ema.averages[0]) == pytest.approx(recorded[step], rel=2e-6), step


def test_updates_fall_on_every_n_th_step_and_start_as_copies() -> None:
    settings = EmaSection(decay=0.9, update_every=3, start_step=4)
    decays = [ema_decay(step, settings) for step in range(1, 15)]
    assert [step for step, decay in enumerate(decays, start=1) if decay is not None] == [1, 4, 7, 10, 13]
    assert decays[0] == decays[3] == decays[6] == 0.0
    assert 0.0 < decays[9] <= decays[12] <= 0.9
