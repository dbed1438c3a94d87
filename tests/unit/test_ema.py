"""The EMA rule against the recorded trace of the published training; several profiles beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rddm_dist.config import EmaSection
from rddm_dist.training.ema import Ema, ema_decay, make_ema, profiles
from rddm_dist.training.engine import Piece
from rddm_dist.training.posthoc import gamma_of

TRACE = Path(__file__).resolve().parents[1] / "golden" / "ema.json"
ROWS: list[tuple[int, float, float]] = [tuple(row) for row in json.loads(TRACE.read_text())["rows"]]


def test_the_published_rule_is_reproduced() -> None:
    piece = Piece("w", 0, torch.zeros(1), {})
    ema = make_ema([piece], profiles(EmaSection()))
    recorded = {step: value for step, value, _ in ROWS}
    for step in range(1, max(recorded) + 1):
        piece.weight.fill_(float(step))
        ema.update(step)
        if step in recorded:
            # Recorded in float32 after up to 189 roundings of it.
            assert float(ema.as_pieces()[0].weight) == pytest.approx(recorded[step], rel=2e-6), step


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
    tenth, thirteenth = decays[9], decays[12]
    assert tenth is not None and thirteenth is not None and 0.0 < tenth <= thirteenth <= 0.9


def test_each_length_adds_a_profile_after_the_published_one() -> None:
    assert [profile.kind for profile in profiles(EmaSection())] == ["ema"]
    settings = EmaSection(lengths=(0.1, 0.05))
    assert [profile.kind for profile in profiles(settings)] == ["ema", "ema-0.1", "ema-0.05"]
    published = profiles(settings)[0]
    assert all(published.decay(step) == ema_decay(step, settings) for step in range(1, 300))


def test_every_profile_is_the_weighted_mean_of_the_weights_so_far() -> None:
    """In float64, from the masses of the steps: a power function's in closed form, the published rule's by unrolling.

    With fp32 updates; pieces of one parameter and of several, as the ranks hold them.
    """
    steps, settings = 150, EmaSection(update_every=3, start_step=30, lengths=(0.05, 0.1, 0.25))
    generator = torch.Generator().manual_seed(0)
    pieces = [Piece("a", 0, torch.zeros(3), {}), Piece("a", 7, torch.zeros(2), {}), Piece("b", 0, torch.zeros(4), {})]
    ema = make_ema(pieces, profiles(settings))
    trajectory = torch.randn(steps, 9, generator=generator, dtype=torch.float64).cumsum(0).float()
    masses = torch.zeros(steps, dtype=torch.float64)
    for step in range(1, steps + 1):
        for piece, values in zip(pieces, trajectory[step - 1].split([3, 2, 4]), strict=True):
            piece.weight.copy_(values)
        ema.update(step)
        decay = ema_decay(step, settings)
        if decay is not None:
            masses *= decay
            masses[step - 1] = 1.0 - decay
        tau = torch.arange(1, step + 1, dtype=torch.float64)
        for kind, length in [("ema", 0.0), ("ema-0.05", 0.05), ("ema-0.1", 0.1), ("ema-0.25", 0.25)]:
            power = gamma_of(length) + 1.0 if length else 0.0
            shares = (tau / step) ** power - ((tau - 1.0) / step) ** power if length else masses[:step]
            assert float(shares.sum()) == pytest.approx(1.0, abs=1e-12)
            averages = ema.as_pieces(kind)
            assert [(piece.name, piece.start, piece.moments) for piece in averages] == [
                ("a", 0, {}),
                ("a", 7, {}),
                ("b", 0, {}),
            ]
            found = torch.cat([piece.weight for piece in averages])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), shares @ trajectory[:step].double(), rtol=1e-5, atol=1e-5)
    assert len({tuple(torch.cat(averages).tolist()) for averages in ema.averages}) == 4


def test_profiles_start_as_copies_of_the_weights_and_leave_them_alone() -> None:
    piece = Piece("w", 0, torch.tensor([1.0, 2.0]), {})
    ema = make_ema([piece], profiles(EmaSection(lengths=(0.1,))))
    piece.weight.fill_(5.0)
    assert [averages[0].tolist() for averages in ema.averages] == [[1.0, 2.0], [1.0, 2.0]]
    for step in range(1, 20):
        ema.update(step)
    assert piece.weight.tolist() == [5.0, 5.0]


def test_the_first_step_wipes_out_what_a_power_profile_started_from() -> None:
    piece = Piece("w", 0, torch.full((2,), 1e30), {})
    ema = make_ema([piece], profiles(EmaSection(lengths=(0.28,))))
    piece.weight.fill_(3.0)
    ema.update(1)
    assert ema.as_pieces("ema-0.28")[0].weight.tolist() == [3.0, 3.0]


def test_without_profiles_an_update_does_nothing() -> None:
    Ema((), (), ()).update(1)
    piece = Piece("w", 0, torch.ones(2), {})
    make_ema([piece], ()).update(1)
    assert piece.weight.tolist() == [1.0, 1.0]


def test_an_average_that_is_not_kept_cannot_be_asked_for() -> None:
    ema = make_ema([Piece("w", 0, torch.ones(2), {})], profiles(EmaSection()))
    with pytest.raises(ValueError, match=r"ema-0\.3"):
        ema.as_pieces("ema-0.3")
