"""Units and their results: named by all they follow from, computed once, taken up again, the same in any order."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import DataError, ModelError, RddmError
from rddm_dist import load_model
from rddm_dist.evaluation.evaluate import Outcome, Plan, plan_files, plan_restoration, run_plan, seconds_per_image
from rddm_dist.evaluation.job import EvalSettings, Job, Unit, make_identity, plan_units
from rddm_dist.evaluation.report import write_report_files
from rddm_dist.evaluation.results import ResultStore, from_bytes, make_table, rows_of, to_bytes, vectors_of
from rddm_dist.evaluation.runner import run_here
from rddm_dist.evaluation.sources import Entry, PackedSource
from rddm_dist.evaluation.summary import build_report
from rddm_dist.tracking.journal import json_safe
from tests.support.datasets import make_dataset
from tests.support.evaluation import feature_network, lpips_network, restoration, tiny_model

COUNT, UNITS = 7, 4  # images of the dataset, and the units of two that they make


class Killed(Exception):
    """What ends an evaluation in the middle."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, other weights, a dataset and two networks."""
    path = tmp_path_factory.mktemp("evaluation")
    tiny_model(path / "model")
    make_dataset(path, count=COUNT, size=(16, 24))
    feature_network(path)
    lpips_network(path)
    return path


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return plan_of(folder)


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The report of an evaluation that nothing came between."""
    return report_bytes(plan, run_plan(plan, out=str(tmp_path_factory.mktemp("whole"))))


def plan_of(folder: Path, *, data: str = "data", keep_images: bool = False, **settings: Any) -> Plan:
    source = PackedSource(str(folder / data))
    model = folder / "model" / "model.safetensors"
    return restoration(model, source, keep_images=keep_images, **{"batch_size": 2, **settings})


def report_bytes(plan: Plan, outcome: Outcome) -> bytes:
    return json.dumps(json_safe(build_report(plan, outcome, name="tiny"))).encode()


def dying_after(count: int) -> Callable[[Job, Sequence[Unit]], Iterator[bytes]]:
    def execute(job: Job, units: Sequence[Unit]) -> Iterator[bytes]:
        yield from run_here(job, units[:count])
        raise Killed

    return execute


class Recording:
    """Runs units here, and tells which."""

    def __init__(self) -> None:
        self.units: list[Unit] = []

    def __call__(self, job: Job, units: Sequence[Unit]) -> Iterator[bytes]:
        self.units.extend(units)
        return run_here(job, units)


def stored(out: Path) -> list[Path]:
    return sorted(out.rglob("*.parquet"))


def digests(plan: Plan) -> set[str]:
    return {unit.digest(plan.job.digest) for unit in plan.units}


def entries(sizes: Sequence[tuple[int, int]]) -> list[Entry]:
    return [Entry(f"k{number:03d}", width, height) for number, (width, height) in enumerate(sizes)]


# Units


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("seed", range(3))
def test_units_hold_every_key_once_in_batches_of_one_size_whatever_the_order(batch_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = entries([(8 * int(width), 8 * int(height)) for width, height in rng.integers(1, 3, (40, 2))])
    units = plan_units(given, batch_size=batch_size)
    keys = [entry.key for unit in units for entry in unit.entries]
    assert sorted(keys) == sorted(entry.key for entry in given)
    for unit in units:
        assert 1 <= len(unit.entries) <= batch_size
        assert len({(entry.width, entry.height) for entry in unit.entries}) == 1
        assert [entry.key for entry in unit.entries] == sorted(entry.key for entry in unit.entries)
    sizes = [(unit.entries[0].height, unit.entries[0].width) for unit in units]
    for size in set(sizes):  # only the last of a size is not full
        assert [len(u.entries) for u, s in zip(units, sizes, strict=True) if s == size][:-1] == [batch_size] * (
            sizes.count(size) - 1
        )
    shuffled = [given[place] for place in rng.permutation(len(given))]
    assert plan_units(shuffled, batch_size=batch_size) == units


def test_a_unit_survives_its_bytes(plan: Plan) -> None:
    for unit in plan.units:
        assert Unit.from_bytes(unit.to_bytes()) == unit


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="the evaluation has no images: the dataset is empty"):
        plan_units([], batch_size=4)


def test_units_of_other_keys_have_other_names() -> None:
    names = [Unit(tuple(entries([(8, 8)] * count))).digest("job") for count in (1, 2, 3)]
    swapped = Unit(tuple(reversed(entries([(8, 8)] * 2)))).digest("job")
    assert len({*names, swapped, Unit(tuple(entries([(8, 8)]))).digest("other")}) == 5


# What results are named after


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"steps": 1},
        {"eta": 0.5},
        {"overrides": ("sample.path=residual_first",)},
        {"samples": 2},
        {"protocol": "y"},
        {"protocol": "rgb+float"},
        {"protocol": "rgb+border1"},
        {"metrics": ("lab_mae",)},
        {"lpips": "lpips.pt"},
        {"features": "features.pt"},
        {"batch_size": 3},
        {"precision": "bf16"},
        {"threads": 2},
    ],
    ids=str,
)
def test_other_settings_give_every_unit_another_name(folder: Path, plan: Plan, changed: dict[str, Any]) -> None:
    for name in ("lpips", "features"):
        if name in changed:
            changed = {**changed, name: str(folder / changed[name])}
    if "overrides" in changed:
        model = load_model(folder / "model", overrides=changed["overrides"])
        settings = replace(plan.job.settings, **changed)
        other = plan_restoration(model, PackedSource(str(folder / "data")), settings)
    else:
        other = plan_of(folder, **changed)
    assert other.job.digest != plan.job.digest
    assert digests(other).isdisjoint(digests(plan))


def test_other_weights_data_or_networks_give_every_unit_another_name(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    copy = tmp_path / "copy"

    def names(where: Path) -> set[str]:
        return digests(plan_of(where, lpips=str(where / "lpips.pt"), features=str(where / "features.pt")))

    def exchange_data() -> None:
        shutil.rmtree(copy / "data")
        make_dataset(copy, count=COUNT, size=(16, 24), seed=1)

    found = [names(folder)]
    assert names(copy) == found[0]  # neither model, data nor networks are named by where they lie
    changes: tuple[Callable[[], object], ...] = (
        lambda: tiny_model(copy / "model", seed=1),
        lambda: lpips_network(copy, seed=1),
        lambda: feature_network(copy, seed=1),
        exchange_data,
    )
    for change in changes:
        change()
        assert all(names(copy).isdisjoint(others) for others in found)
        found.append(names(copy))


def test_the_number_of_a_gpu_is_no_part_of_a_name_and_its_kind_is() -> None:
    names = [make_identity(EvalSettings(device=device), fingerprint="") for device in ("cuda:0", "cuda:1", "cpu")]
    assert names[0] == names[1] != names[2]


def test_keeping_images_and_a_limit_change_no_names(folder: Path, plan: Plan) -> None:
    assert digests(plan_of(folder, keep_images=True)) == digests(plan)
    source = PackedSource(str(folder / "data"))
    fewer = restoration(folder / "model", source, batch_size=2, limit=4)
    assert fewer.num_images == 4 and digests(fewer) < digests(plan)


# Stored tables


def test_a_table_gives_back_its_rows_and_vectors() -> None:
    vector = np.arange(5, dtype=np.float32) / 3
    rows: list[dict[str, Any]] = [
        {"key": "a", "name": "a", "psnr": float("inf"), "width": 7, "features": vector},
        {"key": "b", "name": "b", "psnr": float("nan"), "width": 9},
        {"key": "c", "name": "c", "kind": "unreadable", "error": "it is torn"},
    ]
    table = from_bytes(to_bytes(make_table(rows, unit="u")))
    first, second, third = rows_of(table)
    assert first == {"key": "a", "name": "a", "psnr": float("inf"), "width": 7}
    assert np.isnan(second.pop("psnr")) and second == {"key": "b", "name": "b", "width": 9}
    assert third == rows[2]
    ((key, found),) = vectors_of(table, "features")
    assert key == "a" and found.dtype == np.float32 and np.array_equal(found, vector)
    assert list(vectors_of(table, "logits")) == []


def test_every_flipped_bit_and_every_cut_of_a_stored_table_is_seen(tmp_path: Path) -> None:
    store = ResultStore(str(tmp_path), "job")
    vector = np.ones(3, np.float32)
    store.put("u", make_table([{"key": "a", "name": "a", "psnr": 20.0, "features": vector}], unit="u"))
    (path,) = stored(tmp_path)
    data = path.read_bytes()
    assert store.get("u") is not None
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        assert store.get("u") is None, place
        if place % 16 == 0:
            path.write_bytes(data[:place])
            assert store.get("u") is None, place
    path.write_bytes(data)
    assert store.get("u") is not None


def test_a_newer_table_of_a_unit_takes_the_place_of_the_older(tmp_path: Path) -> None:
    store = ResultStore(str(tmp_path), "job")
    for psnr in (20.0, 30.0):
        store.put("u", make_table([{"key": "a", "name": "a", "psnr": psnr}], unit="u"))
        for reader in (store, ResultStore(str(tmp_path), "job")):
            table = reader.get("u")
            assert table is not None and rows_of(table)[0]["psnr"] == psnr
    assert len(stored(tmp_path)) == 1


# Going on


@pytest.mark.parametrize("done", range(UNITS + 1))
def test_an_evaluation_that_was_killed_goes_on_with_the_missing_units(
    tmp_path: Path, plan: Plan, whole: bytes, done: int
) -> None:
    assert len(plan.units) == UNITS
    with pytest.raises(Killed):
        run_plan(plan, out=str(tmp_path), execute=dying_after(done))
    rest, seen = Recording(), []
    outcome = run_plan(plan, out=str(tmp_path), execute=rest, progress=lambda *state: seen.append(state))
    largest_first = list(reversed(plan.units))
    assert rest.units == largest_first[done:]
    assert outcome.reused == sum(len(unit.entries) for unit in largest_first[:done])
    assert seen[0] == (outcome.reused, COUNT) and seen[-1] == (COUNT, COUNT)
    assert report_bytes(plan, outcome) == whole
    assert len(outcome.cases) == COUNT


def flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def rename(path: Path, other: Path) -> None:
    """The content of another unit, under a name that fits that content."""
    unit, content = path.name.split("-")[0], other.name.split("-")[1]
    path.unlink()
    shutil.copy(other, path.with_name(f"{unit}-{content}"))


@pytest.mark.parametrize("harm", [flip, cut, empty, swap, rename])
def test_a_damaged_result_is_computed_again_and_told(
    tmp_path: Path,
    plan: Plan,
    whole: bytes,
    harm: Callable[[Path, Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_plan(plan, out=str(tmp_path))
    path, other = stored(tmp_path)[1:3]
    harm(path, other)
    again = Recording()
    with caplog.at_level(logging.WARNING):
        outcome = run_plan(plan, out=str(tmp_path), execute=again)
    assert [unit.digest(plan.job.digest) for unit in again.units] == [path.name.split("-")[0]]
    assert "computed again" in caplog.text and path.name.split("-")[0] in caplog.text
    assert report_bytes(plan, outcome) == whole
    caplog.clear()
    assert run_plan(plan, out=str(tmp_path), execute=dying_after(0)).reused == COUNT
    assert not caplog.text


def test_results_of_other_settings_are_never_taken(tmp_path: Path, folder: Path, plan: Plan, whole: bytes) -> None:
    plans = [plan, plan_of(folder, seed=1), plan_of(folder, batch_size=3), plan_of(folder, precision="bf16")]
    outcomes = [run_plan(each, out=str(tmp_path)) for each in plans]
    assert [outcome.reused for outcome in outcomes] == [0] * len(plans)
    assert report_bytes(plan, run_plan(plan, out=str(tmp_path), execute=dying_after(0))) == whole


def test_an_evaluation_of_weights_that_were_exchanged_meanwhile_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, count=2, size=(16, 24))
    tiny_model(tmp_path / "model")
    plan = plan_of(tmp_path)
    tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(ModelError, match="holds other weights than when the evaluation began"):
        run_plan(plan, out=str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["lpips", "features"])
def test_another_network_file_than_the_one_that_was_planned_is_refused(tmp_path: Path, kind: str) -> None:
    make = lpips_network if kind == "lpips" else feature_network
    tiny_model(tmp_path / "model")
    make_dataset(tmp_path, count=2, size=(40, 48))
    plan = restoration(
        tmp_path / "model" / "model.safetensors", PackedSource(str(tmp_path / "data")), **{kind: str(make(tmp_path))}
    )
    make(tmp_path, seed=1)
    with pytest.raises(ModelError, match=f"--{kind} .* is another file here than where the evaluation began"):
        run_plan(plan, out=str(tmp_path / "out"))


def test_our_own_code_is_part_of_a_name(plan: Plan) -> None:
    assert {"rddm_dist", "code", "torch", "numpy", "pillow"} == set(plan.job.identity["software"])
    other = {**plan.job.identity, "software": {**plan.job.identity["software"], "code": "0"}}
    assert replace(plan.job, identity=other).digest != plan.job.digest


def test_set_metrics_have_the_same_digits_when_their_vectors_were_stored(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    make_dataset(tmp_path, count=6, size=(16, 24))
    plan = restoration(
        model,
        PackedSource(str(tmp_path / "data")),
        features=str(feature_network(tmp_path)),
        metrics=("fid", "kid", "is"),
    )
    reports = []
    for threads in (1, 2):
        outcome = run_plan(plan, out=str(tmp_path / "out"))
        torch.set_num_threads(threads)
        reports.append(report_bytes(plan, outcome))
    assert reports[0] == reports[1] and b'"fid"' in reports[0]


def test_a_unit_that_comes_twice_is_a_fault(tmp_path: Path, plan: Plan) -> None:
    def execute(job: Job, units: Sequence[Unit]) -> Iterator[bytes]:
        for data in run_here(job, units):
            yield data
            yield data

    with pytest.raises(RddmError, match="came twice, or of one that nobody asked for"):
        run_plan(plan, out=str(tmp_path), execute=execute)


def test_a_unit_that_does_not_come_is_a_fault(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(RddmError, match=f"1 of {UNITS} units came back without results"):
        run_plan(plan, out=str(tmp_path), execute=lambda job, units: run_here(job, units[1:]))


def test_nothing_is_asked_of_workers_when_all_is_done(tmp_path: Path, plan: Plan) -> None:
    run_plan(plan, out=str(tmp_path))
    assert run_plan(plan, out=str(tmp_path), execute=dying_after(0)).reused == COUNT


# Images that are kept


def png(out: Path, key: str) -> Path:
    return out / "images" / f"{key}.png"


def test_images_asked_for_later_are_made_where_they_are_missing(tmp_path: Path, folder: Path, whole: bytes) -> None:
    plan = plan_of(folder, keep_images=True)
    run_plan(plan_of(folder), out=str(tmp_path))
    assert not (tmp_path / "images").exists()
    outcome = run_plan(plan, out=str(tmp_path))
    assert outcome.reused == 0 and report_bytes(plan, outcome) == whole
    pictures = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert len(pictures) == COUNT
    gone = plan.units[1].entries[0].key
    png(tmp_path, gone).unlink()
    again = Recording()
    run_plan(plan, out=str(tmp_path), execute=again)
    assert again.units == [plan.units[1]]
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == pictures


def test_kept_images_are_those_that_were_scored_whatever_else_was_evaluated_there(tmp_path: Path, folder: Path) -> None:
    run_plan(plan_of(folder, keep_images=True), out=str(tmp_path))
    plan = plan_of(folder, keep_images=True, steps=1)
    run_plan(plan_of(folder, steps=1), out=str(tmp_path))
    outcome = run_plan(plan, out=str(tmp_path))
    scored = plan_files(PackedSource(str(folder / "data")), tmp_path / "images", plan.job.settings)
    rows = run_plan(scored, out=str(tmp_path / "scored")).rows
    assert [row["restored_sha256"] for row in rows] == [row["restored_sha256"] for row in outcome.rows]
    damaged = png(tmp_path, rows[0]["key"])
    Image.new("RGB", (24, 16)).save(damaged)
    assert run_plan(plan, out=str(tmp_path)).reused == COUNT - len(plan.units[0].entries)


# Any order


def test_results_in_any_order_give_the_same_bytes_of_the_report(tmp_path: Path, folder: Path) -> None:
    features, lpips = str(folder / "features.pt"), str(folder / "lpips.pt")
    plan = plan_of(folder, metrics=("fid", "kid", "is"), features=features, lpips=lpips)
    found = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(plan.units))

        def execute(job: Job, units: Sequence[Unit], order: np.ndarray = order) -> Iterator[bytes]:
            results = list(run_here(job, units))
            return (results[place] for place in order)

        outcome = run_plan(plan, out=str(tmp_path / f"results-{seed}"), execute=execute)
        out = tmp_path / f"report-{seed}"
        report = build_report(plan, outcome, name="tiny")
        seconds = seconds_per_image(outcome)
        assert seconds is not None and seconds > 0
        write_report_files(out, report, command="rddm evaluate", cases=outcome.cases, seconds=seconds)
        found.append({name: (out / name).read_bytes() for name in ("report.json", "index.html", "timings.json")})
    for other in found[1:]:
        assert other["report.json"] == found[0]["report.json"]
    assert b"seconds" not in found[0]["report.json"]
    assert json.loads(found[0]["timings.json"])["seconds_per_image"] > 0


def test_a_part_evaluated_before_or_after_shows_the_same_pictures(tmp_path: Path, folder: Path) -> None:
    make_dataset(tmp_path, count=40, size=(16, 24))
    source, model = PackedSource(str(tmp_path / "data")), folder / "model"
    plans = {limit: restoration(model, source, batch_size=8, limit=limit) for limit in (16, 0)}

    def shown(limit: int, out: str) -> list[str]:
        return [case.to_json() for case in run_plan(plans[limit], out=str(tmp_path / out)).cases]

    alone = {limit: shown(limit, f"alone-{limit}") for limit in plans}
    assert len(alone[16]) == 16 and len(alone[0]) == 24
    for limit in (16, 0, 16, 0):
        assert shown(limit, "both") == alone[limit]
