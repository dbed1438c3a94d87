"""Samples from folders and lists, and the one clear line for each mistake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.records import KEY_PATTERN, make_key
from data_pipeline.sources import find_clean, find_pairs, pair_by_index, read_pair_list
from rddm_dist.cli.data import find_samples
from tests.support.datasets import make_folders

POLYU = Path(__file__).resolve().parents[3] / "shared" / "data" / "polyu"


def _image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_images_pair_by_relative_name_whatever_the_extension(tmp_path: Path) -> None:
    for name in ("a.png", "sub/a.JPG", "x1.5.webp"):
        _image(tmp_path / "in" / name)
    for name in ("a.bmp", "sub/a.png", "x1.5.tif"):
        _image(tmp_path / "out" / name)
    pairs = find_pairs(tmp_path / "in", tmp_path / "out")
    assert [(pair.name, pair.files["input"].name, pair.target.name) for pair in pairs] == [
        ("a", "a.png", "a.bmp"),
        ("sub/a", "a.JPG", "a.png"),
        ("x1.5", "x1.5.webp", "x1.5.tif"),
    ]
    assert all(pair.mask is None and KEY_PATTERN.fullmatch(pair.key) for pair in pairs)
    assert len({pair.key for pair in pairs}) == 3


def test_masks_pair_too(tmp_path: Path) -> None:
    input_dir, target_dir = make_folders(tmp_path, count=2, mask=True)
    pairs = find_pairs(input_dir, target_dir, tmp_path / "mask")
    assert [pair.mask for pair in pairs] == [tmp_path / "mask" / f"photo_{number:03d}.png" for number in range(2)]
    (tmp_path / "mask" / "photo_001.png").unlink()
    with pytest.raises(DataError, match=r"--input .* no image of the same name in --mask .*photo_001\.png"):
        find_pairs(input_dir, target_dir, tmp_path / "mask")


@pytest.mark.parametrize("side, other", [("input", "target"), ("target", "input")])
def test_an_orphan_is_named_with_its_folder(tmp_path: Path, side: str, other: str) -> None:
    input_dir, target_dir = make_folders(tmp_path, count=2)
    for number in range(5):
        _image(tmp_path / side / f"orphan{number}.png")
    with pytest.raises(DataError) as caught:
        find_pairs(input_dir, target_dir)
    message = str(caught.value)
    assert message.startswith(f"5 image(s) in --{side}") and f"--{other}" in message
    assert "orphan0.png, orphan1.png, orphan2.png and 2 more" in message and "\n" not in message


def test_unpaired_images_are_paired_by_the_order_of_their_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("dogs/b.png", "dogs/a.png", "dogs/sub/c.png", "cats/9.png", "cats/1.png"):
        _image(tmp_path / name)
    pairs = pair_by_index(tmp_path / "dogs", tmp_path / "cats")
    assert [(pair.name, pair.target.name) for pair in pairs] == [("a", "1.png"), ("b", "9.png")]
    assert "the last 1 are left out" in caplog.text


def test_clean_images_are_targets_without_inputs(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.JPG", ".hidden/c.png"):
        _image(tmp_path / name)
    pairs = find_clean(tmp_path)
    assert [(pair.name, pair.target, pair.input, pair.mask) for pair in pairs] == [
        ("b", tmp_path / "b.png", None, None),
        ("sub/a", tmp_path / "sub" / "a.JPG", None, None),
    ]
    assert pairs[0].files == {"target": pairs[0].target} and pairs[0].first == pairs[0].target
    with pytest.raises(DataError, match="--clean .*nowhere does not exist"):
        find_clean(tmp_path / "nowhere")
    _image(tmp_path / "b.jpg")
    with pytest.raises(DataError, match="have one name, b"):
        find_clean(tmp_path)


def test_missing_and_empty_folders_are_named_with_their_flag(tmp_path: Path) -> None:
    input_dir, target_dir = make_folders(tmp_path, count=1)
    with pytest.raises(DataError, match="--input .*nowhere does not exist"):
        find_pairs(tmp_path / "nowhere", target_dir)
    with pytest.raises(DataError, match="--target .* is not a folder"):
        find_pairs(input_dir, target_dir / "photo_000.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="--target .*empty holds no images"):
        find_pairs(input_dir, tmp_path / "empty")


def test_links_to_folders_are_followed_and_circles_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("clean/a.png", "elsewhere/b.png", "elsewhere/deep/c.png"):
        _image(tmp_path / name)
    (tmp_path / "clean" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "clean" / "again").symlink_to(tmp_path / "elsewhere" / "deep", target_is_directory=True)
    (tmp_path / "clean" / "d.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "clean" / ".hidden").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert [pair.name for pair in find_clean(tmp_path / "clean")] == ["a", "again/c", "d", "more/b", "more/deep/c"]
    assert not caplog.records
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "clean", target_is_directory=True)
    names = [pair.name for pair in find_clean(tmp_path / "clean")]
    assert [name for name in names if "up" not in name] == ["a", "again/c", "d", "more/b", "more/deep/c"]
    assert "more/deep/up leads back to a folder that it lies in and is left out" in caplog.text
    assert not any(name.startswith(("more/deep/up", "again/up")) for name in names)


def test_names_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(DataError, match=r"the name of '.*caf\\udce9\.png' is not UTF-8; rename it"):
        find_clean(tmp_path)
    with pytest.raises(DataError, match=r"the name 'caf\\udce9' is not UTF-8; rename the file"):
        make_key(os.fsdecode(b"caf\xe9"))


def test_a_list_may_mix_absolute_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path, count=2)
    monkeypatch.chdir(tmp_path)
    rows = "input/photo_000.png\ttarget/photo_000.png\n{}input/photo_001.png\ttarget/photo_001.png\n"
    Path("mixed.tsv").write_text(rows.format(f"{tmp_path}/"))
    Path("plain.tsv").write_text(rows.format(""))
    mixed, plain = read_pair_list(Path("mixed.tsv")), read_pair_list(Path("plain.tsv"))
    assert [(pair.key, pair.name) for pair in mixed] == [(pair.key, pair.name) for pair in plain]
    assert [pair.name for pair in plain] == ["photo_000", "photo_001"]


def test_names_too_long_for_a_disk_are_told_in_a_short_line(tmp_path: Path) -> None:
    make_folders(tmp_path, count=1)
    table = tmp_path / "pairs.tsv"
    table.write_text(f"input/photo_000.png\ttarget/photo_000.png\n{'x' * 5000}.png\ttarget/photo_000.png\n")
    with pytest.raises(DataError, match=r"line 2: input image 'x+\.\.\.x+\.png': File name too long") as caught:
        read_pair_list(table)
    assert len(str(caught.value)) < 500
    with pytest.raises(DataError, match="--clean 'x.* cannot be listed: File name too long"):
        find_clean(Path("x" * 5000))


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    input_dir, target_dir = make_folders(tmp_path, count=1)
    _image(input_dir / "photo_000.jpg")
    with pytest.raises(DataError, match="have one name, photo_000"):
        find_pairs(input_dir, target_dir)


def test_hidden_files_are_left_out_and_other_files_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    input_dir, target_dir = make_folders(tmp_path, count=1)
    _image(input_dir / ".thumbs" / "x.png")
    (input_dir / ".DS_Store").write_bytes(b"")
    (input_dir / "readme.txt").write_text("hello")
    assert len(find_pairs(input_dir, target_dir)) == 1
    assert "readme.txt" in caplog.text and "DS_Store" not in caplog.text


def test_keys_are_plain_short_and_distinct() -> None:
    names = ["plain_name-1", "a b", "a_b", "a/b", "a.b", "\u00e4", "x" * 200, "x" * 201]
    keys = [make_key(name) for name in names]
    assert keys[0] == "plain_name-1"
    assert len(set(keys)) == len(names) and all(KEY_PATTERN.fullmatch(key) for key in keys)


def test_a_list_with_and_without_header_gives_the_same_pairs(tmp_path: Path) -> None:
    make_folders(tmp_path, count=2)
    plain, named = tmp_path / "plain.tsv", tmp_path / "named.tsv"
    plain.write_text("input/photo_001.png\ttarget/photo_001.png\n\ninput/photo_000.png\ttarget/photo_000.png\n")
    named.write_text(
        "\ufefftarget\tgroup\tinput\ntarget/photo_001.png\tg\tinput/photo_001.png\n"
        "target/photo_000.png\tg\tinput/photo_000.png\n",
        encoding="utf-8",
    )
    assert read_pair_list(plain) == read_pair_list(named)
    assert [pair.name for pair in read_pair_list(plain)] == ["photo_001", "photo_000"]


def test_a_list_takes_roots_masks_and_a_split(tmp_path: Path) -> None:
    make_folders(tmp_path, count=3, mask=True)
    table = tmp_path / "elsewhere" / "pairs.tsv"
    table.parent.mkdir()
    rows = ["input\ttarget\tmask\tsplit"] + [
        f"photo_{n:03d}.png\tphoto_{n:03d}.png\tphoto_{n:03d}.png\t{'test' if n else 'train'}" for n in range(3)
    ]
    table.write_text("\n".join(rows))
    roots: dict[str, Any] = {f"{field}_root": tmp_path / field for field in ("input", "target", "mask")}
    assert [pair.name for pair in read_pair_list(table, **roots)] == ["photo_000", "photo_001", "photo_002"]
    pairs = read_pair_list(table, split="test", **roots)
    assert [pair.mask for pair in pairs] == [tmp_path / "mask" / f"photo_{n:03d}.png" for n in (1, 2)]
    with pytest.raises(DataError, match="--split val.*its splits are test, train"):
        read_pair_list(table, split="val", **roots)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("input\ttarget\n", "holds no pairs"),
        ("input/photo_000.png\n", r"line 1 has 1 column\(s\)"),
        ("input/photo_000.png\ttarget/photo_000.png\n\nx\ty\tz\n", r"line 3 has 3 column\(s\), not 2"),
        ("input/photo_000.png\ttarget/nothing.png\n", r"line 1: target image 'target/nothing\.png' does not exist"),
        ("input\ttarget\ninput/photo_000.png\t\n", "line 2: target image '' does not exist"),
        ("input/photo_000.png\ttarget/photo_000.png\n" * 2, "have one name"),
        (b"\xff\xfe\x00", "cannot be read as tab-separated text"),
    ],
)
def test_a_bad_list_is_named_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    make_folders(tmp_path, count=1)
    table = tmp_path / "pairs.tsv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_pair_list(table)


def test_a_missing_list_and_a_split_without_column_are_named(tmp_path: Path) -> None:
    make_folders(tmp_path, count=1)
    with pytest.raises(DataError, match="--list .*nowhere.tsv does not exist"):
        read_pair_list(tmp_path / "nowhere.tsv")
    table = tmp_path / "pairs.tsv"
    table.write_text("input/photo_000.png\ttarget/photo_000.png\n")
    with pytest.raises(DataError, match="--split train.*no column split"):
        read_pair_list(table, split="train")


@pytest.mark.skipif(not POLYU.is_dir(), reason="the PolyU pairs are not beside this repository (../shared/data/polyu)")
def test_the_polyu_list_is_understood_as_it_is() -> None:
    splits = {split: read_pair_list(POLYU / "pairs.tsv", split=split) for split in ("train", "test")}
    assert (len(splits["train"]), len(splits["test"])) == (73, 27)
    assert len(read_pair_list(POLYU / "pairs.tsv")) == 100
    assert all(
        pair.files["input"].parent.name == "noisy" and pair.target.parent.name == "clean" for pair in splits["train"]
    )
    assert splits["train"][0].key == "Canon5D2_5_160_3200_chair_11"


NO_SOURCE: dict[str, Any] = {
    "input": None,
    "target": None,
    "mask": None,
    "pair_by": "name",
    "list": None,
    "root": None,
    "layout": "",
    "split": "",
    "clean": None,
}


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give --input and --target folders, --list FILE, --root FOLDER or --clean FOLDER"),
        ({"input": "input"}, "give --input and --target folders"),
        ({"list": "pairs.tsv", "clean": "target"}, "--list and --clean are different sources; give one of them"),
        ({"root": ".", "input": "input"}, "--root and --input are different sources"),
        ({"input": "input", "target": "target", "split": "train"}, "--split=train goes with --list or --root"),
        ({"clean": "target", "split": "train"}, "--split=train goes with --list or --root"),
        ({"clean": "target", "layout": "lol"}, "--layout=lol goes with --root"),
        (
            {"input": "input", "target": "target", "pair_by": "size"},
            "--pair-by=size is not known; choose name or index",
        ),
        ({"clean": "target", "pair_by": "index"}, "--pair-by=index goes with --input and --target"),
    ],
)
def test_the_command_takes_one_kind_of_source(tmp_path: Path, options: dict[str, str], message: str) -> None:
    paths = {
        name: value if name in ("split", "layout", "pair_by") else tmp_path / value for name, value in options.items()
    }
    with pytest.raises(ConfigError, match=message):
        find_samples(**{**NO_SOURCE, **paths})


def test_every_kind_of_source_reaches_the_command(tmp_path: Path) -> None:
    input_dir, target_dir = make_folders(tmp_path / "our485", count=2)
    table = tmp_path / "pairs.tsv"
    table.write_text("photo_001.png\tphoto_001.png\n")
    found = [
        find_samples(**{**NO_SOURCE, "input": input_dir, "target": target_dir}),
        find_samples(**{**NO_SOURCE, "list": table, "input": input_dir, "target": target_dir}),
        find_samples(**{**NO_SOURCE, "clean": target_dir}),
        find_samples(**{**NO_SOURCE, "input": input_dir, "target": target_dir, "pair_by": "index"}),
    ]
    input_dir.rename(tmp_path / "our485" / "low")
    target_dir.rename(tmp_path / "our485" / "high")
    found.append(find_samples(**{**NO_SOURCE, "root": tmp_path, "split": "our485"}))
    both = ["photo_000", "photo_001"]
    assert [[pair.name for pair in pairs] for pairs in found] == [both, ["photo_001"], both, both, both]
