"""Public datasets: each tree is recognised from its root, pairs what belongs together and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.layouts import LAYOUTS, find_layout

# layout, split, files of it, and the sample they make: (name, input, target, mask)
TREES = [
    (
        "raindrop",
        "train",
        ["train/data/7_rain.png", "train/gt/7_clean.png", "test_b/data/0_rain.jpg", "test_b/gt/0_clean.jpg"],
        ("7", "train/data/7_rain.png", "train/gt/7_clean.png", None),
    ),
    (
        "gopro",
        "test",
        ["test/GOPR01/blur/0001.png", "test/GOPR01/blur_gamma/0001.png", "test/GOPR01/sharp/0001.png"],
        ("GOPR01/0001", "test/GOPR01/blur/0001.png", "test/GOPR01/sharp/0001.png", None),
    ),
    (
        "gopro",
        "train",
        ["train/input/a.png", "train/target/a.png", "test/input/b.png", "test/target/b.png"],
        ("a", "train/input/a.png", "train/target/a.png", None),
    ),
    (
        "lol",
        "eval15",
        ["our485/low/2.png", "our485/high/2.png", "eval15/low/1.png", "eval15/high/1.png"],
        ("1", "eval15/low/1.png", "eval15/high/1.png", None),
    ),
    (
        "istd",
        "test",
        ["test/test_A/9-1.png", "test/test_B/9-1.png", "test/test_C/9-1.png"],
        ("9-1", "test/test_A/9-1.png", "test/test_C/9-1.png", "test/test_B/9-1.png"),
    ),
    (
        "sidd",
        "all",
        ["Data/0001_001_S6/0001_NOISY_SRGB_010.PNG", "Data/0001_001_S6/0001_GT_SRGB_010.PNG"],
        (
            "0001_001_S6/0001_SRGB_010",
            "Data/0001_001_S6/0001_NOISY_SRGB_010.PNG",
            "Data/0001_001_S6/0001_GT_SRGB_010.PNG",
            None,
        ),
    ),
    (
        "rain100",
        "train",
        ["train/rain/norain-1.png", "train/norain/norain-1.png", "train/norain/norain-2.png"],
        ("norain-1", "train/rain/norain-1.png", "train/norain/norain-1.png", None),
    ),
    (
        "rain100",
        "test",
        ["test/rain/X2/norain-1x2.png", "test/norain/norain-1.png"],
        ("norain-1", "test/rain/X2/norain-1x2.png", "test/norain/norain-1.png", None),
    ),
    (
        "rain100",
        "all",
        ["rainy/rain-001.png", "norain-001.png"],
        ("001", "rainy/rain-001.png", "norain-001.png", None),
    ),
    ("rain100", "all", ["rain-1.png", "norain-1.png"], ("1", "rain-1.png", "norain-1.png", None)),
    (
        "polyu",
        "all",
        ["CroppedImages/Canon_1_real.JPG", "CroppedImages/Canon_1_mean.JPG"],
        ("Canon_1", "CroppedImages/Canon_1_real.JPG", "CroppedImages/Canon_1_mean.JPG", None),
    ),
    ("bsds", "val", ["images/train/8.jpg", "images/val/3.jpg"], ("3", None, "images/val/3.jpg", None)),
    ("bsds", "train", ["train/100075.jpg"], ("100075", None, "train/100075.jpg", None)),
    ("celeba", "all", ["img_align_celeba/000001.jpg"], ("000001", None, "img_align_celeba/000001.jpg", None)),
]
IDS = [f"{name}-{split}-{number}" for number, (name, split, _, _) in enumerate(TREES)]


def _make(root: Path, files: list[str]) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / file)


@pytest.mark.parametrize("name, split, files, sample", TREES, ids=IDS)
def test_a_tree_is_recognised_and_paired(
    tmp_path: Path, name: str, split: str, files: list[str], sample: tuple[str, str | None, str, str | None]
) -> None:
    _make(tmp_path, files)
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / files[0]).with_name("._hidden.png").write_bytes(b"resource fork")
    layout = find_layout(tmp_path)
    assert layout.name == name
    assert find_layout(tmp_path, name) is layout
    [pair] = layout.pairs(tmp_path, split)
    assert (pair.name, *(_relative(path, tmp_path) for path in (pair.input, pair.target, pair.mask))) == sample


def _relative(path: Path | None, root: Path) -> str | None:
    return None if path is None else path.relative_to(root).as_posix()


@pytest.mark.parametrize("name, split, files, sample", TREES, ids=IDS)
def test_a_root_that_does_not_fit_is_told_the_expected_tree(
    tmp_path: Path, name: str, split: str, files: list[str], sample: object
) -> None:
    _make(tmp_path, [f"deeper/{file}" for file in files])
    with pytest.raises(DataError, match=f"not laid out as --layout {name}: it should hold") as caught:
        find_layout(tmp_path, name)
    assert LAYOUTS[name].tree in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="laid out as none of raindrop, gopro"):
        find_layout(tmp_path)


@pytest.mark.parametrize("spell", [str.upper, str.title, str.swapcase])
@pytest.mark.parametrize("name, split, files, sample", TREES, ids=IDS)
def test_upper_and_lower_case_are_alike(
    tmp_path: Path,
    name: str,
    split: str,
    files: list[str],
    sample: tuple[str, str | None, str, str | None],
    spell: Callable[[str], str],
) -> None:
    _make(tmp_path, [spell(file) for file in files])
    layout = find_layout(tmp_path)
    [pair] = layout.pairs(tmp_path, split)
    assert layout.name == name and pair.name.lower() == sample[0].lower()
    expected = [None if path is None else spell(path) for path in sample[1:]]
    assert [_relative(path, tmp_path) for path in (pair.input, pair.target, pair.mask)] == expected


def test_the_exact_spelling_counts_where_it_is_there(tmp_path: Path) -> None:
    _make(tmp_path, ["our485/low/1.png", "our485/high/1.png", "our485/LOW/2.png", "Our485/low/3.png"])
    [pair] = find_layout(tmp_path).pairs(tmp_path)
    assert pair.input == tmp_path / "our485" / "low" / "1.png"


@pytest.mark.parametrize("folder", ["train", "images/train", "img_align_celeba"])
def test_a_layout_with_inputs_wins_over_clean_images_alone(tmp_path: Path, folder: str) -> None:
    _make(tmp_path, [f"{folder}/8.jpg", "train/rain-1.png", "train/norain-1.png"])
    assert LAYOUTS["rain100"].has_inputs and not (LAYOUTS["bsds"].has_inputs or LAYOUTS["celeba"].has_inputs)
    assert find_layout(tmp_path).name == "rain100"
    _make(tmp_path, ["our485/low/2.png", "our485/high/2.png"])
    with pytest.raises(DataError, match="could be lol or rain100; choose with --layout"):
        find_layout(tmp_path)


def test_every_layout_has_a_tree_here() -> None:
    assert {name for name, _, _, _ in TREES} == set(LAYOUTS)


def test_a_root_that_fits_several_is_asked_about(tmp_path: Path) -> None:
    _make(tmp_path, ["train/data/7_rain.png", "train/gt/7_clean.png", "our485/low/2.png", "our485/high/2.png"])
    with pytest.raises(DataError, match="could be raindrop or lol; choose with --layout"):
        find_layout(tmp_path)
    assert find_layout(tmp_path, "lol").pairs(tmp_path)[0].name == "2"


def test_a_list_of_pairs_is_polyu_only_beside_its_folders(tmp_path: Path) -> None:
    _make(tmp_path, ["noisy/a.jpg", "clean/a.jpg"])
    (tmp_path / "pairs.tsv").write_text("noisy/a.jpg\tclean/a.jpg\n")
    with pytest.raises(DataError, match="should hold .* pairs.tsv .with a column split."):
        find_layout(tmp_path, "polyu")
    (tmp_path / "pairs.tsv").write_text("split\tinput\ttarget\ntest\tnoisy/a.jpg\tclean/a.jpg\n")
    [pair] = find_layout(tmp_path).pairs(tmp_path)
    assert (pair.name, pair.target) == ("a", tmp_path / "clean" / "a.jpg")
    (tmp_path / "noisy").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="laid out as none"):
        find_layout(tmp_path)


def test_a_split_is_asked_for_where_there_are_several(tmp_path: Path) -> None:
    _make(tmp_path, ["our485/low/2.png", "our485/high/2.png", "eval15/low/1.png", "eval15/high/1.png"])
    layout = find_layout(tmp_path)
    with pytest.raises(DataError, match=r"several splits; choose with --split our485\|eval15"):
        layout.pairs(tmp_path)
    with pytest.raises(DataError, match=r"--split train: .* holds our485, eval15"):
        layout.pairs(tmp_path, "train")


def test_an_image_without_partner_is_named(tmp_path: Path) -> None:
    _make(tmp_path, ["our485/low/1.png", "our485/high/1.png", "our485/high/2.png"])
    with pytest.raises(DataError, match=r"1 image\(s\) in .* have no input .*: our485/high/2\.png; add or remove"):
        find_layout(tmp_path).pairs(tmp_path)


def test_clean_images_that_the_download_has_no_rain_for_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _make(tmp_path, ["rain-1.png", "norain-1.png", "norain-2.png"])
    assert [pair.name for pair in find_layout(tmp_path).pairs(tmp_path)] == ["1"]
    assert "1 target(s) without input left out: norain-2.png" in caplog.text
    _make(tmp_path, ["rain-3.png"])
    with pytest.raises(DataError, match=r"have no target .*rain-3\.png"):
        find_layout(tmp_path).pairs(tmp_path)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    _make(tmp_path, ["our485/low/1.png", "our485/low/1.jpg", "our485/high/1.png"])
    with pytest.raises(DataError, match="have one name, 1; rename or remove one"):
        find_layout(tmp_path, "lol")


def test_unknown_names_and_missing_roots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--layout imagenet is not known; choose one of raindrop"):
        find_layout(tmp_path, "imagenet")
    with pytest.raises(DataError, match="--root .*nowhere is no folder"):
        find_layout(tmp_path / "nowhere")


def test_the_real_polyu_pairs_are_recognised(shared_data: Path) -> None:
    root = shared_data / "polyu"
    layout = find_layout(root)
    assert (layout.name, layout.known_splits(root)) == ("polyu", ["test", "train"])
    pairs = {split: layout.pairs(root, split) for split in ("train", "test")}
    assert (len(pairs["train"]), len(pairs["test"])) == (73, 27)
    assert all(pair.input and pair.input.parent.name == "noisy" for pair in pairs["train"])
    with pytest.raises(DataError, match="holds test, train"):
        layout.pairs(root, "val")


def test_the_real_bsds_images_are_recognised(shared_data: Path) -> None:
    root = shared_data / "bsds500"
    layout = find_layout(root)
    pairs = layout.pairs(root)
    assert layout.name == "bsds" and len(pairs) == 200
    assert all(pair.input is None and pair.mask is None and pair.target.is_file() for pair in pairs)
