"""A run that is interrupted, resized and moved uses each sample of the run once, and ends where it would have."""

from __future__ import annotations

import json
import signal
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import storage
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.engine import MOMENTS
from tests.support.datasets import make_dataset
from tests.support.processes import ROOT, run_workers
from tests.support.runs import write_config
from tests.support.servers import lead_to, make_bucket, s3_server

PROBE = (sys.executable, str(ROOT / "tests" / "support" / "ledger_probe.py"))
BATCH, SAMPLES = 6, 20  # no multiple of a step that a run below stops at is an epoch's end
RIGHT_AFTER, LATER = 1e-5, 1e-4
KINDS = (ckpt.WEIGHT, ckpt.EMA, "ema-0.05", *MOMENTS)
Action = dict[str, Any]

pytestmark = pytest.mark.timeout(600)


def go(attempt: str, place: str, stage: int, **stop: int) -> Action:
    """A start of the run in a place, which goes to the end of the run or to where it is stopped."""
    return {"attempt": attempt, "place": place, "stage": stage, **stop}


def carry(source: str, target: str) -> Action:
    return {"copy": [source, target]}


@dataclass(frozen=True)
class Form:
    """What is done, as (world size, actions) of each launch, the undisturbed run in the first; and what comes of it.

    lineages: name -> the attempts whose steps are in a final state, and the place of that; `same` never changes size.
    """

    steps: int
    launches: list[tuple[int, list[Action]]]
    lineages: dict[str, tuple[list[str], str]]


SHORT = Form(
    12,
    [
        (2, [go("undisturbed", "local/undisturbed", 1), go("first", "local/first", 1, term_at=3)]),
        (
            3,
            [
                carry("local/first", "s3/same"),
                carry("local/first", "s3/moved"),
                go("moved-2", "s3/moved", 3, kill_at=8, after_commit=6),
            ],
        ),
        (1, [go("moved-3", "s3/moved", 0, term_at=8)]),
        (
            2,
            [
                carry("s3/moved", "local/moved"),
                go("moved-4", "local/moved", 2),
                go("same-2", "s3/same", 1, term_at=7),
                carry("s3/same", "local/same"),
                go("same-3", "local/same", 1),
            ],
        ),
    ],
    {
        "moved": (["first", "moved-2", "moved-3", "moved-4"], "local/moved"),
        "same": (["first", "same-2", "same-3"], "local/same"),
    },
)
LONG = Form(
    42,
    [
        (2, [go("undisturbed", "local/undisturbed", 3), go("first", "local/first", 3, kill_at=5, after_commit=3)]),
        (4, [carry("local/first", "s3/moved"), go("moved-2", "s3/moved", 2, term_at=6)]),
        (3, [go("moved-3", "s3/moved", 3, kill_at=14, after_commit=12)]),
        (1, [carry("s3/moved", "local/moved"), go("moved-4", "local/moved", 1, kill_at=17, after_commit=15)]),
        (3, [go("moved-5", "local/moved", 0, term_at=21)]),
        (4, [go("moved-6", "local/moved", 1, kill_at=29, after_commit=27)]),
        (
            2,
            [
                go("moved-7", "local/moved", 2),
                carry("local/first", "s3/same"),
                go("same-2", "s3/same", 3, term_at=13),
                go("same-3", "s3/same", 3, term_at=27),
                carry("s3/same", "local/same"),
                go("same-4", "local/same", 3),
            ],
        ),
    ],
    {
        "moved": (["first", *(f"moved-{number}" for number in range(2, 8))], "local/moved"),
        "same": (["first", "same-2", "same-3", "same-4"], "local/same"),
    },
)


@dataclass(frozen=True)
class Attempt:
    """What the ledgers of one start say.   start: step it went on from; rows: step -> of all workers"""

    start: int
    losses: dict[int, float]
    rows: dict[int, list[tuple[int, str, str]]]


@dataclass(frozen=True)
class Journey:
    """A form that was carried out."""

    form: Form
    places: dict[str, str]
    ledgers: Path

    def attempt(self, name: str) -> Attempt:
        losses: dict[int, float] = {}
        rows: dict[int, list[tuple[int, str, str]]] = {}
        starts: list[int] = []
        for path in sorted(self.ledgers.glob(f"{name}-[0-9].jsonl")):
            for entry in map(json.loads, path.read_text().splitlines()):
                if "start" in entry:
                    starts.append(entry["start"])
                    continue
                losses[entry["step"]] = entry["loss"]
                rows.setdefault(entry["step"], []).extend((int(p), key, digest) for p, key, digest in entry["rows"])
        [start] = starts
        return Attempt(start, losses, rows)

    def lineage(self, name: str) -> Attempt:
        """The steps that are in the final state: of each attempt those up to where the next one went on from."""
        attempts = [self.attempt(each) for each in self.form.lineages[name][0]]
        ends = [*(attempt.start for attempt in attempts[1:]), self.form.steps]
        losses: dict[int, float] = {}
        rows: dict[int, list[tuple[int, str, str]]] = {}
        for attempt, end in zip(attempts, ends, strict=True):
            for step in sorted(step for step in attempt.rows if step <= end):
                assert step not in rows, f"step {step} was done twice"
                losses[step], rows[step] = attempt.losses[step], attempt.rows[step]
        return Attempt(0, losses, rows)

    def starts(self, name: str) -> list[int]:
        return [self.attempt(each).start for each in self.form.lineages[name][0]]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as (endpoint, settings), pytest.MonkeyPatch.context() as patch:
        lead_to(settings, patch)
        yield make_bucket(endpoint, "runs")


@pytest.fixture(
    scope="module", params=[pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)
def journey(request: pytest.FixtureRequest, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    form: Form = request.param
    folder = tmp_path_factory.mktemp("journey")
    config = write_config(folder, make_dataset(folder, count=SAMPLES))
    (folder / "ledgers").mkdir()
    roots = {"local": str(folder / "places"), "s3": storage.join(bucket, f"steps-{form.steps}")}
    named = {action["place"] for _, actions in form.launches for action in actions if "place" in action}
    places = {place: storage.join(roots[place.split("/")[0]], place.split("/")[1]) for place in named}
    for number, (world_size, actions) in enumerate(form.launches):
        path = folder / f"actions-{number}.json"
        path.write_text(json.dumps([settled(action, form, places, folder) for action in actions]))
        command = [*PROBE, str(config), str(path), str(folder / "ledgers")]
        results = run_workers(command, world_size, cwd=folder, timeout_s=200)
        is_killed = "kill_at" in actions[-1]
        expected = -signal.SIGKILL if is_killed else 0
        assert {result.code for result in results} == {expected}, "\n".join(result.text for result in results)
        ended = [line.split()[1:] for line in results[0].stdout.splitlines() if line.startswith("RUN ")]
        starts = [action for action in actions if "attempt" in action and "kill_at" not in action]
        assert ended == [[action["attempt"], "75" if "term_at" in action else "0"] for action in starts]
    return Journey(form, places, folder / "ledgers")


def settled(action: Action, form: Form, places: dict[str, str], folder: Path) -> Action:
    """An action as the probe takes it."""
    if "copy" in action:
        return {"copy": [places[place] for place in action["copy"]]}
    overrides = [
        f"run.storage={places[action['place']]}",
        f"run.work_dir={folder / 'work'}",
        f"engine.zero_stage={action['stage']}",
        f"train.steps={form.steps}",
        "train.checkpoint_every=3",
        "ema.lengths=[0.05]",
        "ema.snapshot_every=3",
    ]
    return {**action, "overrides": overrides}


def final_state(place: str) -> dict[str, torch.Tensor]:
    found = ckpt.find_newest(storage.join(place, f"tiny/{ckpt.CHECKPOINTS}"))
    assert found is not None
    return {f"{kind}/{name}": value for kind in KINDS for name, value in found.read_full(kind).items()}


@pytest.mark.parametrize("name", ["moved", "same"])
def test_each_position_is_used_exactly_once_whatever_interrupted_the_run(journey: Journey, name: str) -> None:
    """And with the sample and the pixels that it would have had."""
    used = [row for rows in journey.lineage(name).rows.values() for row in rows]
    assert sorted(position for position, *_ in used) == list(range(journey.form.steps * BATCH))
    undisturbed = journey.attempt("undisturbed")
    assert sorted(used) == sorted(row for rows in undisturbed.rows.values() for row in rows)
    assert len({key for _, key, _ in used}) == SAMPLES
    assert not any(start * BATCH % SAMPLES == 0 for start in journey.starts(name)[1:]), "all stops are inside an epoch"


def test_what_was_done_after_the_last_commit_before_a_kill_is_void_and_done_again(journey: Journey) -> None:
    names = journey.form.lineages["moved"][0]
    killed = {
        action["attempt"]: action for _, actions in journey.form.launches for action in actions if "kill_at" in action
    }
    assert killed
    for name, following in zip(names, names[1:], strict=False):
        if name in killed:
            before, after = journey.attempt(name), journey.attempt(following)
            void = set(before.rows) - set(range(after.start + 1))
            assert after.start == killed[name]["after_commit"]
            assert void == set(range(after.start + 1, killed[name]["kill_at"] + 1)) and void <= set(after.rows)
            assert all(sorted(before.rows[step]) == sorted(after.rows[step]) for step in void)


@pytest.mark.parametrize("name", ["moved", "same"])
def test_losses_are_those_of_the_undisturbed_run(journey: Journey, name: str) -> None:
    expected, losses = journey.attempt("undisturbed").losses, journey.lineage(name).losses
    assert sorted(losses) == sorted(expected) == list(range(1, journey.form.steps + 1))
    assert [losses[step] for step in sorted(losses)] == pytest.approx(
        [expected[step] for step in sorted(losses)], rel=LATER
    )
    for start in journey.starts(name):
        assert losses[start + 1] == pytest.approx(expected[start + 1], rel=RIGHT_AFTER)


def test_at_equal_size_the_run_ends_with_the_same_bits_over_stops_and_moves(journey: Journey) -> None:
    expected = final_state(journey.places["local/undisturbed"])
    state = final_state(journey.places[journey.form.lineages["same"][1]])
    assert expected.keys() == state.keys()
    assert [n for n in expected if not torch.equal(expected[n].view(torch.int32), state[n].view(torch.int32))] == []
    assert journey.lineage("same").losses == journey.attempt("undisturbed").losses


def test_checkpoints_hold_safetensors_and_json_alone(journey: Journey) -> None:
    count = 0
    for place in journey.places.values():
        for series in (ckpt.CHECKPOINTS, ckpt.AVERAGES):
            folder = storage.join(place, f"tiny/{series}")
            for step in ckpt.list_steps(folder):
                uri = ckpt.step_folder(folder, step)
                for name in storage.list_names(uri):
                    check_kind(name, storage.read_bytes(storage.join(uri, name)))
                    count += 1
    assert count > 20


def check_kind(name: str, content: bytes) -> None:
    """A safetensors file is a JSON header with its length before it, then just as many bytes as that speaks of."""
    if name.endswith(".json"):
        assert isinstance(json.loads(content), dict), name
        return
    assert name.endswith(".safetensors"), name
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert len(content) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())


def test_the_journal_goes_with_the_run_to_another_storage_and_back(journey: Journey) -> None:
    """A run folder that was copied tells of every step, whichever way each storage keeps the journal."""
    journal = Path(journey.places["local/moved"]) / "tiny" / "metrics.jsonl"
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    told = {record["step"] for record in records if "train/loss" in record.get("metrics", {})}
    assert told == set(range(1, journey.form.steps + 1))
