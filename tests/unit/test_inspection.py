"""What a run folder holds is told rightly, compared bit by bit, and pruned without ever losing the last sound state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, EnvironmentFault, ModelError
from rddm_dist.config import EmaSection
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training import streaming
from rddm_dist.training.ema import kind_of, make_ema, profiles
from rddm_dist.training.engine import Piece
from rddm_dist.training.inspection import (
    Entry,
    Place,
    find_damage,
    newest_sound,
    place_of,
    prune,
    read_scores_of,
    run_of,
    scan,
)
from rddm_dist.training.ownership import take
from rddm_dist.training.retention import Retention
from rddm_dist.training.streaming import averages_of, compare, rebuild
from tests.support.saved import drawn, flip_a_bit, leave_unfinished, make_newer, save

SHAPES = {"a.weight": (4, 3), "a.bias": (5,), "scale": (), "b": (2, 3, 7)}
NUM = 12 + 5 + 1 + 42


def state(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    return {"weight": drawn(seed, SHAPES), "ema": drawn(seed + 1, SHAPES), "exp_avg": drawn(seed + 2, SHAPES)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 to 40 and averages of 10 and 20."""
    home = tmp_path / "runs" / "demo"
    for step in (10, 20, 30, 40):
        save(home / "checkpoints", step, state(step), ranks=2)
    for step in (10, 20):
        save(home / "averages", step, {"ema-0.1": drawn(step, SHAPES)})
    (home / "config.yaml").write_text("run: {name: demo}\n")
    records = [{"event": "metrics", "step": step, "metrics": {"train/loss": step / 10}} for step in (10, 20, 30, 40)]
    (home / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return home


def steps(run: Path, row: str = "checkpoints") -> list[int]:
    return [entry.step for entry in scan(str(run), row)]


def at(run: Path, step: int) -> ckpt.Checkpoint:
    return ckpt.read_commit(ckpt.step_folder(str(run / "checkpoints"), step))


# -- finding -----------------------------------------------------------------------------------------------------------


def test_a_run_and_the_checkpoints_in_it_are_told_apart(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, checkpoint = str(run), f"{run}/averages/step-00000010"
    monkeypatch.chdir(run)
    for given in (home, f"{home}/", f"file://{home}", "."):
        assert place_of(given) == Place(home) and run_of(given) == home
    for given in (checkpoint, f"{checkpoint}/", "averages/step-00000010"):
        assert place_of(given) == Place(home, checkpoint)
    with pytest.raises(ModelError, match=f"is one checkpoint; give its run folder {home}"):
        run_of(checkpoint)


@pytest.mark.parametrize("given", ["checkpoints", "checkpoints/step-00000050", "logs/step-00000010", "nothing", "/"])
def test_anything_else_is_refused_with_what_would_do(run: Path, given: str) -> None:
    (run / "logs" / "step-00000010").mkdir(parents=True)
    with pytest.raises(ModelError, match="neither a run folder .* nor a checkpoint inside one; give for example"):
        place_of(str(run / given))


def test_every_state_of_a_checkpoint_is_named(run: Path) -> None:
    leave_unfinished(run / "checkpoints", 50, num_bytes=70)
    make_newer(at(run, 30))
    commit = run / "checkpoints" / "step-00000020" / ckpt.COMMIT
    commit.write_text(commit.read_text().replace('"position": 120', '"position": 121'))
    found = {entry.step: entry for entry in scan(str(run), "checkpoints")}
    states = {step: entry.state for step, entry in found.items()}
    assert states == {50: "unfinished", 40: "committed", 30: "newer format", 20: "damaged", 10: "committed"}
    assert list(states) == [50, 40, 30, 20, 10]
    assert found[50].num_bytes == 70 and found[40].checkpoint == at(run, 40)
    assert "upgrade it" in found[30].problem and "damaged: its own sha256" in found[20].problem
    assert all((entry.problem == "") == (entry.checkpoint is not None) for entry in found.values())
    assert scan(str(run), "search") == []


def test_scores_come_from_the_journal(run: Path) -> None:
    assert read_scores_of(str(run), "train/loss") == {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}
    assert read_scores_of(str(run), "preview/psnr") == {}


def test_the_newest_sound_checkpoint_is_found_and_of_a_search_while_it_lasts(run: Path) -> None:
    flip_a_bit(at(run, 40))
    assert newest_sound(str(run)).progress.step == 30
    (run / "checkpoints").rename(run / "search")
    assert newest_sound(str(run)).uri == f"{run}/search/step-00000030"
    (run / "search").rename(run / "elsewhere")
    with pytest.raises(ModelError, match="has no checkpoint yet"):
        newest_sound(str(run))


# -- verifying ---------------------------------------------------------------------------------------------------------


def entry_of(run: Path, step: int) -> Entry:
    return next(entry for entry in scan(str(run), "checkpoints") if entry.step == step)


def test_a_flip_of_any_byte_of_any_file_is_damage(run: Path) -> None:
    read: list[int] = []
    assert find_damage(entry_of(run, 40), on_file=lambda: read.append(1)) == "" and len(read) == 4
    for path in sorted((run / "checkpoints" / "step-00000040").iterdir()):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert path.name in find_damage(entry_of(run, 40))
        path.write_bytes(content)
    assert find_damage(entry_of(run, 40)) == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "instead of"),
        (lambda path: path.write_bytes((path.parent / "rank-00000.safetensors").read_bytes()), "is damaged"),
    ],
)
def test_files_that_are_gone_cut_or_swapped_are_damage(run: Path, change: Callable[[Path], None], told: str) -> None:
    change(run / "checkpoints" / "step-00000040" / "rank-00001.safetensors")
    problem = find_damage(entry_of(run, 40))
    assert "rank-00001.safetensors" in problem and told in problem


# -- comparing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [7, 1 << 23])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_state_is_bit_equal_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, window: int
) -> None:
    monkeypatch.setattr(streaming, "WINDOW_ELEMENTS", window)
    one = save(tmp_path / "one", 10, state())
    other = save(tmp_path / "other", 10, state(), ranks=ranks, zero_stage=2)
    found = compare(one, other)
    assert found.is_bit_equal and set(found.scalars) == {"zero_stage", *(["world_size"] if ranks > 1 else [])}
    assert [(kind.kind, kind.elements, kind.differing) for kind in found.kinds] == [
        (kind, NUM, 0) for kind in ("ema", "exp_avg", "weight")
    ]


@pytest.mark.parametrize("window", [1, 7, 1 << 23])
def test_differences_are_those_of_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(streaming, "WINDOW_ELEMENTS", window)
    kinds, changed = state(), state()
    changed["ema"]["b"][1, 2, 3] += 0.5
    changed["ema"]["a.bias"][2] -= 0.25
    found = compare(
        save(tmp_path / "one", 10, kinds, ranks=2), save(tmp_path / "other", 20, changed, loss_scaler={"scale": 2.0})
    )
    a, b = (torch.cat([value.reshape(-1) for value in each["ema"].values()]).double() for each in (kinds, changed))
    assert not found.is_bit_equal and [kind.differing for kind in found.kinds] == [2, 0, 0]
    ema = found.kinds[0]
    assert ema.parameter == "b" and ema.largest == float((a - b).abs().max())
    assert ema.relative == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-12)
    assert found.scalars == {
        "step": (10, 20), "position": (60, 120), "optimizer_step": (10, 20), "world_size": (2, 1),
        "loss_scaler": ({}, {"scale": 2.0}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "differing", "largest", "relative"),
    [
        (math.nan, math.nan, 0, 0.0, 0.0),
        (math.inf, math.inf, 0, 0.0, 0.0),
        (0.0, -0.0, 1, 0.0, 0.0),
        (0.0, 1.0, 1, 1.0, math.inf),
        (math.nan, 1.0, 1, math.nan, math.nan),
        (1.0, math.inf, 1, math.inf, math.inf),
        (math.inf, 1.0, 1, math.inf, math.nan),
    ],
)
def test_bits_decide_what_is_equal(
    tmp_path: Path, a: float, b: float, differing: int, largest: float, relative: float
) -> None:
    checkpoints = [
        save(tmp_path / str(index), 10, {"weight": {"p": torch.tensor([value, 0.0])}})
        for index, value in enumerate((a, b))
    ]
    [kind] = compare(*checkpoints).kinds
    assert kind.differing == differing and kind.largest == pytest.approx(largest, nan_ok=True)
    assert kind.relative == pytest.approx(relative, nan_ok=True)
    assert kind.parameter == ("p" if largest else "")


def test_what_only_one_holds_is_a_difference(tmp_path: Path) -> None:
    one = save(tmp_path / "one", 10, state())
    fewer = {kind: tensors for kind, tensors in state().items() if kind != "ema"}
    found = compare(one, save(tmp_path / "fewer", 10, fewer))
    assert found.alone == ("kind ema only in A",) and not found.is_bit_equal and len(found.kinds) == 2
    shapes = {**{name: shape for name, shape in SHAPES.items() if name != "scale"}, "b": (42,), "new": (1,)}
    found = compare(one, save(tmp_path / "shapes", 10, {"weight": drawn(0, shapes)}))
    assert found.alone == (
        "kind ema only in A", "kind exp_avg only in A", "parameter scale only in A", "parameter new only in B",
        "parameter b is [2, 3, 7] in A and [42] in B",
    )  # fmt: skip
    assert [kind.elements for kind in found.kinds] == [17]


# -- pruning -----------------------------------------------------------------------------------------------------------


def test_a_prune_deletes_what_is_not_kept_and_leftovers(run: Path) -> None:
    left = [leave_unfinished(run / row, 25, num_bytes=70) for row in ("checkpoints", "averages")]
    sizes = {step: at(run, step).num_bytes for step in (20, 30)}
    retention = Retention(1, keep_best=1, metric="train/loss")
    planned = prune(str(run), retention, dry_run=True)
    assert steps(run) == [40, 30, 25, 20, 10], "a dry run deletes nothing"
    done = prune(str(run), retention)
    assert done == planned
    assert done.kept == {40: "last", 10: "best"} and done.notes == ()
    assert {(entry.row, entry.step) for entry in done.removed} == {
        ("checkpoints", 30), ("checkpoints", 25), ("checkpoints", 20), ("averages", 25)
    }  # fmt: skip
    assert done.num_bytes == sum(sizes.values()) + 140
    assert steps(run) == [40, 10] and steps(run, "averages") == [20, 10]
    assert not any(folder.exists() for folder in left)
    assert sorted(path.name for path in run.iterdir()) == ["averages", "checkpoints", "config.yaml", "metrics.jsonl"]
    assert prune(str(run), retention).removed == ()


def test_with_a_damaged_newest_one_the_newest_sound_one_stays(run: Path) -> None:
    flip_a_bit(at(run, 40))
    (run / "checkpoints" / "step-00000030" / ckpt.COMMIT).write_text("{")
    done = prune(str(run), Retention(1))
    assert steps(run) == [40, 30, 20] and done.kept == {20: "last"}
    assert len(done.notes) == 3 and done.notes[2].endswith("step-00000020, which stays")
    assert all("left as it is" in note for note in done.notes[:2])
    assert newest_sound(str(run)).progress.step == 20


def test_older_damaged_commits_go_and_take_no_place(run: Path) -> None:
    (run / "checkpoints" / "step-00000030" / ckpt.COMMIT).write_text("{")
    assert prune(str(run), Retention(2)).kept == {20: "last", 40: "last"}
    assert steps(run) == [40, 20]


def test_where_nothing_is_sound_nothing_is_deleted(run: Path) -> None:
    for step in (10, 20, 30, 40):
        flip_a_bit(at(run, step))
    leave_unfinished(run / "checkpoints", 50)
    with pytest.raises(ModelError, match="no sound checkpoint in"):
        prune(str(run), Retention(1))
    assert steps(run) == [50, 40, 30, 20, 10]


@pytest.mark.parametrize("keep_last", [0, -1])
def test_a_prune_that_would_leave_nothing_is_refused(run: Path, keep_last: int) -> None:
    with pytest.raises(ConfigError, match=f"--keep-last {keep_last} would leave nothing"):
        prune(str(run), Retention(keep_last))
    assert steps(run) == [40, 30, 20, 10]


def test_what_a_later_version_wrote_is_not_touched(run: Path) -> None:
    make_newer(at(run, 10))
    with pytest.raises(ckpt.NewerFormat, match="upgrade it"):
        prune(str(run), Retention(1))
    assert steps(run) == [40, 30, 20, 10]


def test_a_run_that_somebody_owns_is_left_alone(run: Path) -> None:
    for dry_run in (False, True):
        with take(str(run)), pytest.raises(EnvironmentFault, match="is in use by pid .* last sign of life"):
            prune(str(run), Retention(1), dry_run=dry_run)
    assert steps(run) == [40, 30, 20, 10]


def test_best_ones_cannot_be_kept_without_values_to_go_by(run: Path) -> None:
    with pytest.raises(ConfigError, match="keep_best=2 goes by preview/psnr, of which the journal .* has no value"):
        prune(str(run), Retention(1, keep_best=2, metric="preview/psnr"))
    assert steps(run) == [40, 30, 20, 10]


def test_a_prune_of_a_run_without_checkpoints_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert prune(str(tmp_path), Retention(1)).removed == ()


# -- averages ----------------------------------------------------------------------------------------------------------

LENGTHS = (0.05, 0.1, 0.08)


def walk(run: Path, *, num_steps: int, every: int) -> dict[int, dict[str, dict[str, Tensor]]]:
    """Save the averages of weights on a random walk.   -> step -> kind -> parameter -> what was tracked"""
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator).reshape(-1) for name, shape in SHAPES.items()}
    pieces = [Piece(name, 0, weight, {}) for name, weight in weights.items()]
    ema = make_ema(pieces, profiles(EmaSection(lengths=LENGTHS)))
    tracked = {}
    for step in range(1, num_steps + 1):
        for weight in weights.values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
        ema.update(step)
        if step % every == 0:
            kinds = {
                kind: {piece.name: piece.weight.clone().view(SHAPES[piece.name]) for piece in ema.as_pieces(kind)}
                for kind in map(kind_of, LENGTHS)
            }
            kinds["weight"] = {name: weight.clone().view(SHAPES[name]) for name, weight in weights.items()}
            tracked[step] = kinds
            save(run / "averages", step, {kind: kinds[kind] for kind in map(kind_of, LENGTHS)}, ranks=step % 3 + 1)
    return tracked


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1).double() for value in tensors.values()])


@pytest.mark.parametrize("window", [11, 1 << 23])
def test_an_average_of_a_length_that_was_not_kept_is_the_one_that_was_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(streaming, "WINDOW_ELEMENTS", window)
    tracked = walk(tmp_path, num_steps=60, every=5)
    for step in (40, 60):
        sources = averages_of(str(tmp_path), up_to=step)
        made = rebuild(sources, step=step, length=0.08, lengths=(0.05, 0.1))
        wanted = flat(tracked[step][kind_of(0.08)])
        scale = float((wanted - flat(tracked[step]["weight"])).norm())
        assert made.snapshots == len(sources) == step // 5
        assert made.error < 0.01
        assert float((flat(made.state) - wanted).norm()) < 0.01 * scale


def test_a_length_that_was_kept_comes_back_as_it_is_stored(tmp_path: Path) -> None:
    tracked = walk(tmp_path, num_steps=60, every=5)
    for length in LENGTHS:
        made = rebuild(averages_of(str(tmp_path)), step=60, length=length, lengths=LENGTHS)
        torch.testing.assert_close(flat(made.state), flat(tracked[60][kind_of(length)]), rtol=1e-6, atol=1e-6)
        assert made.error < 1e-10


def test_damaged_snapshots_are_left_out_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    walk(tmp_path, num_steps=20, every=5)
    path = flip_a_bit(ckpt.read_commit(f"{tmp_path}/averages/step-00000010"))
    leave_unfinished(tmp_path / "averages", 25)
    told: list[tuple[int, int]] = []
    found = averages_of(str(tmp_path), on_verified=lambda done, total: told.append((done, total)))
    assert [each.progress.step for each in found] == [20, 15, 5] and told[-1] == (5, 5)
    [record] = caplog.records
    assert "LEAVING OUT" in record.getMessage() and path.name in record.getMessage()


def test_the_newest_checkpoint_counts_where_it_is_newer_than_the_snapshots(tmp_path: Path) -> None:
    tracked = walk(tmp_path, num_steps=20, every=5)
    averages = {kind_of(length): tracked[20][kind_of(length)] for length in LENGTHS}
    for step in (5, 7, 12):
        save(tmp_path / "checkpoints", step, {"weight": tracked[5]["weight"], **averages})
    found = averages_of(str(tmp_path), up_to=12)
    assert [each.progress.step for each in found] == [12, 10, 5]
    assert [each.uri.rsplit("/", 2)[1] for each in found] == ["checkpoints", "averages", "averages"]
    assert [each.progress.step for each in averages_of(str(tmp_path), up_to=9)] == [7, 5]
    assert [each.progress.step for each in averages_of(str(tmp_path))] == [20, 15, 12, 10, 5]
