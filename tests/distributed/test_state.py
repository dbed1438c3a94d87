"""State under ZeRO: every stage computes the same, and a checkpoint of any stage and size loads at any other."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.processes import ROOT, run_workers

PROBE = (sys.executable, str(ROOT / "tests" / "support" / "state_probe.py"))
FP32_RIGHT_AFTER, FP32_LATER = 1e-5, 1e-4
LATER = 30  # steps after the first change of world size
BF16 = 2e-3  # five times what was measured; weights that were not loaded give 1.6e-2
EMA_TOLERANCE = 1e-6
pytestmark = pytest.mark.timeout(1800)
KINDS = {"ema", "ema-0.05", "ema-0.2"}


def fp32(*stages: int) -> dict[str, Any]:
    return {"precision": "fp32", "stages": stages}


def bf16(*stages: int) -> dict[str, Any]:
    return {"precision": "bf16", "stages": stages}


SHORT: dict[str, Any] = {
    "links": [(2, 3, 4), (3, 2, 0), (1, 2, 0)],
    "rows": {
        "from-0": fp32(0, 3, 2),
        "from-1": fp32(1, 2, 3),
        "from-2": fp32(2, 0, 1),
        "from-3": fp32(3, 1, 0),
        "bf16": bf16(1, 3, 2),
    },
}
MATRIX: dict[str, Any] = {
    "links": [(1, 3, LATER), (2, 2, 2), (4, 2, 2), (3, 2, 2), (1, LATER - 6, 2)],
    "rows": {
        **{f"fp32-{stage}": fp32(*[stage] * 5) for stage in (0, 1, 2, 3)},
        **{f"bf16-{stage}": bf16(*[stage] * 5) for stage in (1, 2, 3)},
        "fp32-up": fp32(0, 1, 2, 3, 0),
        "fp32-down": fp32(3, 2, 1, 0, 3),
        "fp32-cross": fp32(2, 0, 3, 1, 2),
        "bf16-mixed": bf16(1, 3, 2, 1, 3),
    },
}


@dataclass(frozen=True)
class Chain:
    """A chain that was run, with what each of its links has seen of each row."""

    links: list[tuple[int, int, int]]
    rows: dict[str, dict[str, Any]]
    seen: list[dict[str, dict[str, Any]]]

    def undisturbed(self, name: str) -> list[float]:
        """Losses of all steps at the world size of the first link."""
        return [*self.seen[0][name]["losses"], *self.seen[0][name]["undisturbed"]]

    def losses(self, name: str) -> list[float]:
        """Losses of all steps, over all links."""
        return [loss for link in self.seen for loss in link[name]["losses"]]

    def of(self, precision: str) -> list[str]:
        return [name for name, row in self.rows.items() if row["precision"] == precision]


@pytest.fixture(
    scope="module", params=[pytest.param(SHORT, id="short"), pytest.param(MATRIX, id="matrix", marks=pytest.mark.slow)]
)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    (folder / "chain.json").write_text(json.dumps(request.param))
    seen = []
    for index, (world_size, *_) in enumerate(request.param["links"]):
        results = run_workers([*PROBE, str(folder), str(index)], world_size, cwd=folder, timeout_s=600)
        assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)
        seen.append(json.loads((folder / f"link-{index}.json").read_text()))
    return Chain(request.param["links"], request.param["rows"], seen)


def test_every_stage_computes_the_same_losses(chain: Chain) -> None:
    expected = chain.undisturbed(chain.of("fp32")[0])
    assert {chain.rows[name]["stages"][0] for name in chain.of("fp32")} == {0, 1, 2, 3}
    for name in chain.of("fp32"):
        assert chain.undisturbed(name) == pytest.approx(expected, rel=FP32_RIGHT_AFTER), name


def test_what_is_saved_is_loaded_bit_equal_at_every_stage_and_size(chain: Chain) -> None:
    """Weights, moments, averages of all kinds and the optimizer's step, seen without the checkpoint's format."""
    before = 0
    for (_, steps, _), link in zip(chain.links, chain.seen, strict=True):
        for name in chain.rows:
            assert link[name]["differing"] == [], name
            assert link[name]["optimizer_step"] == before, name
            assert bool(link[name]["compared"]) == bool(before), name
            assert link[name]["compared"] % (3 + len(KINDS)) == 0, name
        before += steps


def test_losses_after_a_load_are_those_of_the_undisturbed_run(chain: Chain) -> None:
    """Right after the change of world size, and to the end of the chain."""
    starts = [sum(steps for _, steps, _ in chain.links[:index]) for index in range(1, len(chain.links))]
    for name in chain.rows:
        expected, losses = chain.undisturbed(name), chain.losses(name)
        is_fp32 = chain.rows[name]["precision"] == "fp32"
        assert losses == pytest.approx(expected, rel=FP32_LATER if is_fp32 else BF16), name
        for step in starts:
            assert losses[step] == pytest.approx(expected[step], rel=FP32_RIGHT_AFTER if is_fp32 else BF16), name


def test_at_equal_size_and_stage_the_continuation_is_bit_equal(chain: Chain) -> None:
    compared = 0
    for (*_, further), link in zip(chain.links, chain.seen, strict=True):
        for name in chain.rows if further else ():
            seen = link[name]
            assert len(seen["again"]) == further and seen["again"] == seen["undisturbed"], name
            assert seen["again_compared"] and seen["again_differing"] == [], name
            compared += 1
    assert compared >= len(chain.rows)


def test_averages_are_those_of_one_process_in_float64_at_every_stage_and_size(chain: Chain) -> None:
    """The reference goes on from its own file over every change of world size."""
    for link in chain.seen:
        for name in chain.rows:
            errors = link[name]["ema_errors"]
            assert set(errors) == KINDS and max(errors.values()) <= EMA_TOLERANCE, (name, errors)
    assert all(min(seen["ema_errors"].values()) > 0.0 for seen in chain.seen[0].values()), "nothing was averaged"
