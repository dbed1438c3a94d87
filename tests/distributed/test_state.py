"""State under ZeRO: every stage computes the same, and a checkpoint of any stage and size loads at any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, run_workers

PROBE = (sys.executable, str(ROOT / "tests" / "support" / "state_probe.py"))


def lines(text: str, word: str) -> list[list[str]]:
    return [line.split()[1:] for line in text.splitlines() if line.startswith(f"{word} ")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Checkpoints of all stages from two workers, and the losses on the way."""
    folder = tmp_path_factory.mktemp("state")
    results = run_workers([*PROBE, "save", str(folder)], 2, cwd=folder, timeout_s=200)
    assert [result.code for result in results] == [0, 0], results[0].text + results[1].text
    losses = {stage: [float(value) for value in values] for stage, *values in lines(results[0].stdout, "losses")}
    return folder, losses


def test_every_stage_computes_the_same_losses(saved: tuple[Path, dict[str, list[float]]]) -> None:
    _, losses = saved
    assert sorted(losses) == ["0", "1", "2", "3"]
    for stage in "123":
        assert losses[stage] == pytest.approx(losses["0"], rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_loads_bit_equal_at_another_stage_and_size(
    saved: tuple[Path, dict[str, list[float]]], world_size: int
) -> None:
    folder, _ = saved
    results = run_workers([*PROBE, "load", str(folder)], world_size, cwd=folder, timeout_s=200)
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
    following = [float(loss) for *_, loss in lines(results[0].stdout, "next")]
    assert len(following) == 4
    assert following == pytest.approx([following[0]] * 4, rel=1e-5)
