"""Every fault on the bytes of a committed checkpoint is noticed before anything of it is used."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import EnvironmentFault, ModelError
from rddm_dist.training import checkpoint as ckpt
from rddm_dist.training.fragments import Fragments, Key, Request, Snapshot, read_index
from rddm_dist.training.retention import Retention, sweep

SHAPES = {"a": (3, 4), "b": (10,)}
WORLD_SIZE = 2
FILES = ("COMMIT.json", "rank-00000.json", "rank-00000.safetensors", "rank-00001.json", "rank-00001.safetensors")


def write_checkpoint(folder: Path, step: int, *, run: str) -> Path:
    """A committed checkpoint of two ranks, who hold half of each parameter.   -> its folder"""
    place = Path(ckpt.step_folder(str(folder), step))
    place.mkdir(parents=True)
    files: dict[str, tuple[int, str]] = {}
    for rank in range(WORLD_SIZE):
        sources = []
        for name, shape in SHAPES.items():
            half = torch.Size(shape).numel() // WORLD_SIZE
            for kind in (ckpt.WEIGHT, ckpt.EMA):
                sources.append((Key(kind, name, rank * half), torch.full((half,), step + rank / 2)))
        snapshot = Snapshot(sources)
        snapshot.take()
        data, receipt = place / f"rank-{rank:05d}.safetensors", place / f"rank-{rank:05d}.json"
        digest = snapshot.write(str(data))
        receipt.write_text(
            json.dumps({"attempt": f"{run}-{step}", "bytes": snapshot.num_bytes, "sha256": digest, "rank": rank})
        )
        files[data.name] = (snapshot.num_bytes, digest)
        files[receipt.name] = (receipt.stat().st_size, ckpt.sha256_of(receipt.read_bytes()))
    ckpt.write_commit(str(place), progress_at(step, run), SHAPES, files)
    return place


def progress_at(step: int, run: str) -> ckpt.Progress:
    return ckpt.Progress(
        step=step,
        position=6 * step,
        optimizer_step=step,
        config_digest=run,
        data_fingerprint="f",
        world_size=WORLD_SIZE,
        zero_stage=1,
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one` and `other` with checkpoints of steps 5 and 10."""
    home = tmp_path_factory.mktemp("sound")
    for run in ("one", "other"):
        for step in (5, 10):
            write_checkpoint(home / run, step, run=run)
    return home


@pytest.fixture
def home(sound: Path, tmp_path: Path) -> Path:
    """A copy of the runs that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "runs"))


def newest(folder: Path) -> Path:
    return Path(ckpt.step_folder(str(folder), 10))


def check_skipped(folder: Path, *, is_told: bool = True) -> None:
    """The checkpoint of step 10 is passed over for that of step 5, and without that nothing is found."""
    skipped: list[str] = []
    found = ckpt.find_newest(str(folder), skipped=skipped)
    together, told = ckpt.find_newest_together(str(folder))
    assert found is not None and together is not None
    assert found.progress.step == together.progress.step == 5
    assert len(skipped) == len(told) == is_told
    assert all("\n" not in problem and "step-00000010" in problem for problem in skipped)
    shutil.rmtree(ckpt.step_folder(str(folder), 5))
    if not is_told:
        assert ckpt.find_newest(str(folder)) is None
        return
    for find in (ckpt.find_newest, ckpt.find_newest_together):
        with pytest.raises(ModelError, match="^no sound checkpoint in .*; newest: .*step-00000010"):
            find(str(folder))


def check_refused(place: Path) -> None:
    with pytest.raises(ModelError):
        ckpt.verify(ckpt.read_commit(str(place)))


def test_a_sound_checkpoint_is_found_and_read(sound: Path) -> None:
    skipped: list[str] = []
    found = ckpt.find_newest(str(sound / "one"), skipped=skipped)
    together, told = ckpt.find_newest_together(str(sound / "one"))
    assert found is not None and found.progress.step == 10 and found == together and skipped == told == []
    assert (
        sorted([*found.files, ckpt.COMMIT])
        == list(FILES)
        == sorted(path.name for path in newest(sound / "one").iterdir())
    )
    for name, value in found.read_full(ckpt.EMA).items():
        assert value.shape == SHAPES[name] and value.flatten()[0] == 10 and value.flatten()[-1] == 10.5


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_in_every_byte(home: Path, name: str) -> None:
    path = newest(home / "one") / name
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        check_refused(path.parent)
    check_skipped(home / "one")
    path.write_bytes(content)
    ckpt.verify(ckpt.read_commit(str(path.parent)))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "one byte shorter": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one byte longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "twice": lambda content: content * 2,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_of_other_content_is_noticed(home: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = newest(home / "one") / name
    path.write_bytes(damage(path.read_bytes()))
    check_refused(path.parent)
    check_skipped(home / "one")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_is_noticed(home: Path, name: str) -> None:
    """Without COMMIT.json there is no checkpoint, which is how an unfinished one looks."""
    path = newest(home / "one") / name
    path.unlink()
    check_refused(path.parent)
    check_skipped(home / "one", is_told=name != ckpt.COMMIT)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_noticed(home: Path, name: str) -> None:
    path = newest(home / "one") / name
    path.unlink()
    path.mkdir()
    check_refused(path.parent)
    check_skipped(home / "one")


def test_a_file_that_cannot_be_read_right_now_is_no_damage(home: Path) -> None:
    """The start is refused: a run that passed over the checkpoint would delete it."""
    place = newest(home / "one") / "rank-00000.safetensors"
    place.unlink()
    place.symlink_to(place)
    for find in (ckpt.find_newest, ckpt.find_newest_together):
        with pytest.raises(EnvironmentFault, match="cannot be read .*; mend that, then run it again"):
            find(str(home / "one"))


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


@pytest.mark.parametrize("endings", [("safetensors",), ("json",), ("safetensors", "json")])
def test_swapped_files_of_two_ranks_are_noticed(home: Path, endings: tuple[str, ...]) -> None:
    place = newest(home / "one")
    for ending in endings:
        swap(place / f"rank-00000.{ending}", place / f"rank-00001.{ending}")
    check_refused(place)
    check_skipped(home / "one")


@pytest.mark.parametrize("source", ["one/step-00000005", "other/step-00000010", "other/step-00000005"])
@pytest.mark.parametrize(
    "names", [FILES[:1], FILES[1:2], FILES[2:3], FILES[1:]], ids=["commit", "receipt", "data", "all"]
)
def test_files_of_another_step_or_run_are_noticed(home: Path, source: str, names: tuple[str, ...]) -> None:
    """Those of another run at the same step hold the same tensors, so that the receipts alone tell them apart."""
    place = newest(home / "one")
    is_equal = all((home / source / name).read_bytes() == (place / name).read_bytes() for name in names)
    assert is_equal == (source == "other/step-00000010" and names == FILES[2:3])
    for name in names:
        shutil.copy(home / source / name, place / name)
    if not is_equal:
        check_refused(place)
        check_skipped(home / "one")


def test_a_checkpoint_under_the_name_of_another_step_is_noticed(home: Path) -> None:
    shutil.rmtree(newest(home / "one"))
    shutil.copytree(ckpt.step_folder(str(home / "one"), 5), newest(home / "one"))
    check_skipped(home / "one")


def sealed(body: dict[str, Any]) -> bytes:
    """A COMMIT.json that agrees with itself."""
    content = {key: value for key, value in body.items() if key != "sha256"}
    return json.dumps({**content, "sha256": ckpt.sha256_of(json.dumps(content, sort_keys=True).encode())}).encode()


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b'"x"', b"\xff", b"{", b"[" * 10**5, b"1e999", b"NaN"])
def test_a_commit_that_is_no_commit_is_noticed(home: Path, content: bytes) -> None:
    (newest(home / "one") / ckpt.COMMIT).write_bytes(content)
    check_refused(newest(home / "one"))
    check_skipped(home / "one")


@pytest.mark.parametrize("key", ["progress", "shapes", "files"])
@pytest.mark.parametrize("value", [None, 3, "x", {"x": 3}, {"step": 10}])
def test_a_commit_that_agrees_with_itself_and_says_nonsense_is_noticed(home: Path, key: str, value: object) -> None:
    path = newest(home / "one") / ckpt.COMMIT
    path.write_bytes(sealed({**json.loads(path.read_bytes()), key: value}))
    check_refused(path.parent)
    check_skipped(home / "one")


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_newer_format_is_refused_and_not_passed_over(home: Path, is_sealed: bool) -> None:
    """Going on from step 5 would drop what a later version of the package has trained."""
    path = newest(home / "one") / ckpt.COMMIT
    body = {**json.loads(path.read_bytes()), "format_version": ckpt.FORMAT_VERSION + 1}
    path.write_bytes(sealed(body) if is_sealed else json.dumps(body).encode())
    for find in (ckpt.find_newest, ckpt.find_newest_together):
        with pytest.raises(ckpt.NewerFormat, match=f"has checkpoint format {ckpt.FORMAT_VERSION + 1}, .* upgrade it"):
            find(str(home / "one"))


def test_a_folder_of_an_older_unfinished_save_is_no_checkpoint(home: Path) -> None:
    place = Path(ckpt.step_folder(str(home / "one"), 12))
    place.mkdir()
    shutil.copy(newest(home / "one") / "rank-00000.safetensors", place)
    skipped: list[str] = []
    found = ckpt.find_newest(str(home / "one"), skipped=skipped)
    assert found is not None and found.progress.step == 10 and skipped == []


def test_what_cannot_be_removed_does_not_keep_the_rest(home: Path) -> None:
    folder = home / "one"
    for step in (1, 3):
        write_checkpoint(folder, step, run="one")
    (folder / "step-00000012").write_text("a file where a folder belongs")
    (Path(ckpt.step_folder(str(folder), 3)) / "kept").mkdir()
    assert sweep(str(folder), Retention(keep_last=2), newest=10) == [5, 10]
    assert ckpt.list_steps(str(folder)) == [12, 10, 5, 3]
    assert not ckpt.is_committed(ckpt.step_folder(str(folder), 3))


def test_a_removed_checkpoint_gives_its_room_back_though_it_was_read(home: Path) -> None:
    """A file that is kept open takes room until it is closed."""
    found = ckpt.find_newest(str(home / "one"))
    assert found is not None
    found.read_full(ckpt.WEIGHT)
    ckpt.remove(found.uri)
    assert not newest(home / "one").exists()
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [path for path in held if path.startswith(str(home))] == []


# -- files that were made to harm --------------------------------------------------------------------------------------


def file_of(header: object, *, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """A safetensors file; length: what its first 8 bytes say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(low: Any = 0, high: Any = 16, *, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [low, high]}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "shorter than a length": b"\0" * 7,
    "longer header than the file": file_of({}, length=2**20),
    "the longest header": file_of({}, length=2**64 - 1),
    "a header of -1 bytes": struct.pack("<q", -1) + b"{}",
    "no JSON": file_of(b"\xff\xfe{}"),
    "half JSON": file_of(b'{"weight/a@0": '),
    "deep JSON": file_of(b"[" * 10**5),
    "a list": file_of([1, 2]),
    "a number": file_of(3),
    "an entry that is none": file_of({"weight/a@0": 3}),
    "an entry of text": file_of({"weight/a@0": "F32"}),
    "an entry without offsets": file_of({"weight/a@0": {"dtype": "F32", "shape": [4]}}),
    "three offsets": file_of({"weight/a@0": {**tensor(), "data_offsets": [0, 8, 16]}}),
    "no start": file_of({"weight/a": tensor()}),
    "a start of text": file_of({"weight/a@x": tensor()}),
    "a start of -4": file_of({"weight/a@-4": tensor()}),
    "two dimensions": file_of({"weight/a@0": tensor(shape=(2, 2))}),
    "another type": file_of({"weight/a@0": tensor(dtype="F64", shape=(2,))}),
    "behind the end": file_of({"weight/a@0": tensor(52, 68)}),
    "far behind the end": file_of({"weight/a@0": tensor(2**60, 2**60 + 16)}),
    "before the beginning": file_of({"weight/a@0": tensor(-16, 0)}),
    "backwards": file_of({"weight/a@0": tensor(16, 0, shape=(-4,))}),
    "too few bytes": file_of({"weight/a@0": tensor(0, 12)}),
    "too many bytes": file_of({"weight/a@0": tensor(0, 20)}),
    "parts of bytes": file_of({"weight/a@0": tensor(0.5, 16.5)}),
    "offsets of floats": file_of({"weight/a@0": tensor(0.0, 16.0, shape=(4.0,))}),
    "offsets of booleans": file_of({"weight/a@0": tensor(False, True, shape=(0.25,))}),
    "not a number": file_of({"weight/a@0": tensor(float("nan"), float("nan"), shape=(float("nan"),))}),
    "huge numbers": file_of({"weight/a@0": tensor(0, 4 * 10**30, shape=(10**30,))}),
    "bytes used twice": file_of({"weight/a@0": tensor(), "weight/b@0": tensor(8, 24)}),
    "elements that are there twice": file_of({"weight/a@0": tensor(), "weight/a@2": tensor(16, 32)}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="rank-00000.safetensors") as caught:
        Fragments(read_index([str(path)]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_good_file_made_the_same_way_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(
        file_of({"__metadata__": {}, "weight/a@0": tensor(), "weight/a@4": tensor(16, 32)}, data=bytes(range(64)))
    )
    target = torch.empty(6)
    Fragments(read_index([str(path)])).fill([Request(target, "weight", "a", 1)])
    assert target.numpy().tobytes() == bytes(range(4, 28))


def test_a_header_that_fills_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 2**39))
    with open(path, "r+b") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(ModelError, match="its header has"):
        Fragments(read_index([str(path)]))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "file" / "inside"):
        with pytest.raises(ModelError, match=str(path)):
            Fragments(read_index([str(path)]))


def test_two_files_that_hold_the_same_elements_are_refused(tmp_path: Path) -> None:
    """Elements that are there twice would make up for others that are missing."""
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(file_of({"weight/a@0": tensor()}))
    with pytest.raises(ModelError, match="holds elements of weight a that .*/x holds as well"):
        Fragments(read_index([str(tmp_path / "x"), str(tmp_path / "y")]))


def test_missing_elements_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file_of({"weight/a@0": tensor(), "weight/a@6": tensor(16, 32)}))
    fragments = Fragments(read_index([str(tmp_path / "x")]))
    for kind, name, start, numel in (
        ("weight", "a", 3, 4),
        ("weight", "a", 8, 4),
        ("ema", "a", 0, 1),
        ("weight", "b", 0, 1),
    ):
        with pytest.raises(ModelError, match="elements of"):
            fragments.fill([Request(torch.empty(numel), kind, name, start)])
