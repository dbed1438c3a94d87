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
ROWS: list[tuple[int, float, float]] = [tuple(row) for row in json.loads(TRACE.read_text())["rows"]]


def test_the_published_rule_is_reproduced() -> None:
    piece = Piece("w", 0, torch.zeros(1), {})
    ema = make_ema([piece])
    settings = EmaSection()
    recorded = {step: value for step, value, _ in ROWS}
    for step in range(1, max(recorded) + 1):
        piece.weight.fill_(float(step))
        ema.update(step, settings)
        if step in recorded:
            # Recorded in float32 after up to 189 roundings of it.
            assert float(ema.averages[0]) == pytest.approx(recorded[step], rel=2e-6), step


@pytest.mark.parametrize(("step", "decay"), [(step, decay) for step, _, decay in ROWS])
def test_the_published_decays_are_reproduced(step: int, decay: float) -> None:
    """They are recorded after every call; here a decay belongs to an update, the first of which still copies."""
    settings = EmaSection()
    of_update = ema_decay(step, settings)
    assert (of_update is not None) == (step % settings.update_every == 1)
    if step > 111 and of_update is not None:
        assert of_update == pytest.approx(decay, rel=1e-12)
    elif of_update is not None:
        assert of_update == 0.0 and (decay == 0.0 or step == 111)
    # Updating at every step there is nothing between the updates, and the copy that starts the average comes first.
    every = ema_decay(step, EmaSection(update_every=1))
    assert every == pytest.approx(0.0 if step == 102 else decay, rel=1e-12)


def test_the_average_is_that_of_exact_arithmetic() -> None:
    """The trace again in float64: what is recorded is the rule, not its rounding."""
    settings, average = EmaSection(), 0.0
    for step in range(1, 2001):
        decay = ema_decay(step, settings)
        if decay is not None:
            average += (1.0 - decay) * (step - average)
        for row, value, _ in ROWS:
            assert row != step or average == pytest.approx(value, rel=2e-6), step


def test_updates_fall_on_every_n_th_step_and_start_as_copies() -> None:
    settings = EmaSection(decay=0.9, update_every=3, start_step=4)
    decays = [ema_decay(step, settings) for step in range(1, 15)]
    assert [step for step, decay in enumerate(decays, start=1) if decay is not None] == [1, 4, 7, 10, 13]
    assert decays[0] == decays[3] == decays[6] == 0.0
    assert 0.0 < decays[9] <= decays[12] <= 0.9
