"""Sources of an evaluation: folders and packed datasets are the same images; what does not fit is told at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import BadSample, ConfigError, DataError, EnvironmentFault
from data_pipeline.pack import pack
from data_pipeline.sources import find_clean, find_pairs
from rddm_dist.evaluation.evaluate import plan_files, run_plan
from rddm_dist.evaluation.job import EvalSettings
from rddm_dist.evaluation.sources import (
    Entry,
    FileSource,
    Images,
    PackedSource,
    attach_outputs,
    open_source,
    pixel_digest,
    require,
)
from rddm_dist.evaluation.summary import build_report
from tests.support.datasets import make_dataset, make_folders, random_image
from tests.support.evaluation import restoration, tiny_model

SIZE = (16, 24)


def sources(folder: Path, *, count: int = 5, mask: bool = False) -> tuple[FileSource, PackedSource]:
    """The same images, one of them in a subfolder and called with a blank, as files and packed."""
    make_folders(folder, count=count, size=SIZE, mask=mask)
    names = ("input", "target", "mask") if mask else ("input", "target")
    for name in names:
        (folder / name / "more").mkdir()
        (folder / name / "photo_002.png").rename(folder / name / "more" / "a photo.png")
    pairs = find_pairs(folder / "input", folder / "target", folder / "mask" if mask else None)
    pack(pairs, str(folder / "data"), shard_mb=0.02)
    return FileSource(pairs, uri="folders"), PackedSource(str(folder / "data"))


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def never(*_: Any) -> Iterator[bytes]:
    raise AssertionError("something was computed")


def test_files_and_the_dataset_packed_of_them_hold_the_same_images(tmp_path: Path) -> None:
    files, packed = sources(tmp_path, mask=True)
    ours, theirs = files.entries(), packed.entries()
    assert [entry.key for entry in ours] == [entry.key for entry in theirs] == sorted(entry.key for entry in ours)
    assert len(ours) == files.num_samples == packed.num_samples == 5
    assert {(entry.width, entry.height) for entry in [*ours, *theirs]} == {(24, 16)}
    for mine, other in zip(ours, theirs, strict=True):
        image, same = files.read(mine), packed.read(other)
        assert (image.key, image.name) == (same.key, same.name)
        for field in ("input", "target", "mask"):
            assert np.array_equal(getattr(image, field), getattr(same, field)), field
        assert image.mask is not None and image.mask.shape == (*SIZE, 1)
        assert image.restored is same.restored is None
    assert "more/a photo" in {entry.name for entry in ours}


@pytest.mark.parametrize("protocol", ["rgb", "istd"])
def test_files_and_the_dataset_packed_of_them_have_the_same_scores(tmp_path: Path, protocol: str) -> None:
    model = tiny_model(tmp_path / "model")
    reports = []
    for source in sources(tmp_path, mask=protocol == "istd"):
        plan = restoration(model, source, protocol=protocol)
        outcome = run_plan(plan, out=str(tmp_path / f"out-{source.spec()['kind']}"))
        reports.append(build_report(plan, outcome, name="tiny"))
    assert len(reports[0]["images"]) == 5 and reports[0]["scores"]["psnr"]["count"] == 5
    for part in ("images", "scores", "protocol", "sampler"):
        assert reports[0][part] == reports[1][part], part
    assert reports[0]["data"]["targets_digest"] == reports[1]["data"]["targets_digest"]


def test_the_targets_digest_names_pixels_whatever_the_files_are_called(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("one", 0), ("other", 0), ("changed", 1)):
        _, target = make_folders(tmp_path / name, count=3, size=SIZE, seed=seed)
        if name == "other":
            for number, path in enumerate(sorted(target.iterdir())):
                path.rename(path.with_name(f"new_{9 - number}.png"))  # the last is the first
        plan = plan_files(FileSource(find_clean(target)), target, EvalSettings())
        report = build_report(plan, run_plan(plan, out=str(tmp_path / f"{name}-out")), name=name)
        digests.append(report["data"]["targets_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_fingerprint_changes_with_a_byte_and_a_name_and_not_with_the_folder(tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return FileSource(find_pairs(folder / "input", folder / "target")).fingerprint

    first = tmp_path / "first"
    make_folders(first, count=3, size=SIZE)
    copies = {name: shutil.copytree(first, tmp_path / name) for name in ("same", "byte", "name")}
    with (copies["byte"] / "input" / "photo_001.png").open("ab") as file:
        file.write(b"\0")
    for field in ("input", "target"):
        (copies["name"] / field / "photo_001.png").rename(copies["name"] / field / "photo_009.png")
    found = {name: fingerprint(folder) for name, folder in copies.items()}
    assert found["same"] == fingerprint(first)
    assert len(set(found.values())) == 3


def test_a_source_made_of_its_spec_reads_the_same(tmp_path: Path) -> None:
    for source in sources(tmp_path):
        other = open_source(json.loads(json.dumps(source.spec())))
        entry = source.entries()[1]
        handed = Entry.from_json(json.loads(json.dumps(entry.to_json())))
        assert handed == entry
        image, same = source.read(entry), other.read(handed)
        assert np.array_equal(image.target, same.target) and image.name == same.name


def test_the_spec_of_a_local_dataset_says_where_it_lies_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, count=2, size=SIZE)
    monkeypatch.chdir(tmp_path)
    source = PackedSource("data")
    assert source.spec() == {"kind": "packed", "uri": str(tmp_path / "data"), "fingerprint": source.fingerprint}


def test_outputs_belong_to_an_entry_by_key_or_by_name(tmp_path: Path) -> None:
    files, packed = sources(tmp_path)
    pixels = {pair.key: random_image(70 + number, SIZE) for number, pair in enumerate(files.entries())}
    for entry in files.entries():
        write(tmp_path / "by_key" / f"{entry.key}.png", pixels[entry.key])
        write(tmp_path / "by_name" / f"{entry.name}.png", pixels[entry.key])
    for source in (files, packed):
        for folder in ("by_key", "by_name"):
            entries = attach_outputs(source.entries(), tmp_path / folder)
            images: list[Images] = [source.read(entry) for entry in entries]
            assert [image.key for image in images] == sorted(pixels)
            for image in images:
                assert image.restored is not None and np.array_equal(image.restored, pixels[image.key]), folder


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("outputs", "1 of 3 targets have no image of the same name in .*outputs: photo_001; add the images"),
        ("target", "1 of 3 images in .*outputs have no target of the same name: photo_001.png; remove them"),
    ],
)
def test_an_image_missing_on_one_side_is_named(tmp_path: Path, removed: str, message: str) -> None:
    _, target = make_folders(tmp_path, count=3, size=SIZE)
    shutil.copytree(target, tmp_path / "outputs")
    (tmp_path / removed / "photo_001.png").unlink()
    with pytest.raises(DataError, match=message):
        plan_files(FileSource(find_clean(target)), tmp_path / "outputs", EvalSettings())


def test_a_folder_without_outputs_is_refused(tmp_path: Path) -> None:
    _, target = make_folders(tmp_path, count=2, size=SIZE)
    (tmp_path / "outputs").mkdir()
    for folder in (tmp_path / "outputs", tmp_path / "absent"):
        with pytest.raises(DataError, match=folder.name):
            plan_files(FileSource(find_clean(target)), folder, EvalSettings())


def resized_outputs(tmp_path: Path) -> tuple[FileSource, Path]:
    """Three targets, and outputs of which the second is larger."""
    _, target = make_folders(tmp_path, count=3, size=SIZE)
    shutil.copytree(target, tmp_path / "outputs")
    write(tmp_path / "outputs" / "photo_001.png", random_image(1, (20, 30)))
    return FileSource(find_clean(target)), tmp_path / "outputs"


@pytest.mark.parametrize("protocol", ["rgb", "y", "lol", "lol-gtmean", "rgb+border2+float"])
def test_outputs_of_another_size_are_refused_where_sizes_are_native(tmp_path: Path, protocol: str) -> None:
    source, outputs = resized_outputs(tmp_path)
    with pytest.raises(DataError, match=r"photo_001 \(restored\): protocol .* got 30x20 for a target of 24x16"):
        plan_files(source, outputs, EvalSettings(protocol=protocol))


def test_outputs_of_another_size_are_scored_where_all_are_resized(tmp_path: Path) -> None:
    source, outputs = resized_outputs(tmp_path)
    plan = plan_files(source, outputs, EvalSettings(protocol="rddm-256"))
    report = build_report(plan, run_plan(plan, out=str(tmp_path / "out")), name="resized")
    psnr = {row["key"]: row["psnr"] for row in report["images"]}
    assert psnr["photo_000"] == psnr["photo_002"] == float("inf")
    assert 0 < psnr["photo_001"] < 30


def test_inputs_of_another_size_than_their_targets_are_refused_before_anything_runs(tmp_path: Path) -> None:
    input_dir, target = make_folders(tmp_path, count=3, size=SIZE)
    write(input_dir / "photo_002.png", random_image(1, (20, 30)))
    source = FileSource(find_pairs(input_dir, target))
    model = tiny_model(tmp_path / "model")
    with pytest.raises(DataError, match=r"photo_002 \(input\): protocol rgb compares images of one size"):
        run_plan(restoration(model, source), out=str(tmp_path / "out"), execute=never)
    plan = restoration(model, source, protocol="rddm-256")
    report = build_report(plan, run_plan(plan, out=str(tmp_path / "out")), name="tiny")
    assert [(row["width"], row["height"]) for row in report["images"]] == [(24, 16), (24, 16), (30, 20)]
    assert report["scores"]["psnr"]["count"] == report["scores"]["input_psnr"]["count"] == 3


def test_images_too_small_for_a_metric_are_refused_before_anything_runs(tmp_path: Path) -> None:
    source = PackedSource(make_dataset(tmp_path, count=2, size=(10, 24)))
    with pytest.raises(DataError, match="photo_000 .*SSIM needs images of at least 11x11 pixels, got 24x10"):
        restoration(tiny_model(tmp_path / "model"), source)


def test_images_without_masks_are_refused_where_a_protocol_needs_them(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    for source in sources(tmp_path):
        with pytest.raises(ConfigError, match=r"protocol istd needs masks and .* has none"):
            restoration(model, source, protocol="istd")


def test_clean_images_alone_are_refused_where_degraded_ones_are_needed(tmp_path: Path) -> None:
    _, target = make_folders(tmp_path, count=2, size=SIZE)
    source = FileSource(find_clean(target), uri=str(target))
    assert not source.has_input
    with pytest.raises(DataError, match="holds clean images only"):
        restoration(tiny_model(tmp_path / "model"), source)
    require(source)  # asks for nothing


def test_a_folder_of_images_given_as_a_packed_dataset_is_explained(tmp_path: Path) -> None:
    _, target = make_folders(tmp_path, count=2, size=SIZE)
    with pytest.raises(DataError, match=r"holds no manifest.json, so it is no packed dataset; pack it with rddm pack"):
        PackedSource(str(target))


def test_a_file_that_is_no_image_is_named_before_anything_runs(tmp_path: Path) -> None:
    input_dir, target = make_folders(tmp_path, count=3, size=SIZE)
    (input_dir / "photo_001.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"photo_001.png: .*; replace or remove it"):
        restoration(tiny_model(tmp_path / "model"), FileSource(find_pairs(input_dir, target)))


def test_an_image_that_is_cut_off_is_a_bad_sample_with_its_name(tmp_path: Path) -> None:
    _, target = make_folders(tmp_path, count=1, size=SIZE)
    path = target / "photo_000.png"
    path.write_bytes(path.read_bytes()[:-40])
    source = FileSource(find_clean(target))
    with pytest.raises(BadSample, match="photo_000.png"):
        source.read(source.entries()[0])


def test_a_pixel_digest_tells_shapes_and_pixels_apart() -> None:
    image = random_image(0, SIZE)
    changed = image.copy()
    changed[3, 4, 1] ^= 1
    assert pixel_digest(image) == pixel_digest(np.asfortranarray(image))
    assert len({pixel_digest(each) for each in (image, changed, image.reshape(24, 16, 3))}) == 3


def test_a_mask_of_another_size_matters_to_a_model_that_sees_it_alone(tmp_path: Path) -> None:
    make_folders(tmp_path, count=2, size=SIZE, mask=True)
    path = tmp_path / "mask" / "photo_001.png"
    Image.open(path).resize((12, 8)).save(path)
    files = FileSource(find_pairs(tmp_path / "input", tmp_path / "target", tmp_path / "mask"), uri="folders")
    blind = restoration(tiny_model(tmp_path / "blind"), files)
    assert len(run_plan(blind, out=str(tmp_path / "out")).rows) == 2
    seeing = tiny_model(tmp_path / "seeing", model={"condition": "input_mask"})
    with pytest.raises(
        DataError, match="photo_001 .mask.: the model needs a mask of the input's size, got 12x8 for 24x16"
    ):
        restoration(seeing, files)


def test_another_dataset_or_file_than_the_one_that_was_planned_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    files, packed = sources(tmp_path)
    plans = [restoration(model, source) for source in (files, packed)]
    Image.fromarray(random_image(9, SIZE)).save(tmp_path / "input" / "photo_001.png")
    shutil.rmtree(tmp_path / "data")
    pack(find_pairs(tmp_path / "input", tmp_path / "target"), str(tmp_path / "data"), shard_mb=0.02)
    for plan, message in zip(plans, ("photo_001.png is another file", "is another dataset here"), strict=True):
        with pytest.raises(DataError, match=message):
            run_plan(plan, out=str(tmp_path / "out"))


def test_a_file_that_a_machine_does_not_see_is_no_bad_image(tmp_path: Path) -> None:
    files, _ = sources(tmp_path)
    plan = restoration(tiny_model(tmp_path / "model"), files)
    (tmp_path / "target" / "photo_001.png").unlink()
    with pytest.raises(EnvironmentFault, match="cannot be read on .* put the files where every machine"):
        run_plan(plan, out=str(tmp_path / "out"))


def test_an_image_turned_by_what_stands_behind_its_pixels_is_listed(tmp_path: Path) -> None:
    files, _ = sources(tmp_path)
    path = tmp_path / "input" / "photo_001.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(path)
    image.load()
    image.save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:start] + data[start + len(chunk) : end] + chunk + data[end:])
    files = FileSource(find_pairs(tmp_path / "input", tmp_path / "target"), uri="folders")
    outcome = run_plan(restoration(tiny_model(tmp_path / "model"), files), out=str(tmp_path / "out"))
    failed = [row for row in outcome.rows if "kind" in row]
    assert len(outcome.rows) == 5 and [row["key"] for row in failed] == ["photo_001"]
    assert "its header says 24x16, its pixels are 16x24" in failed[0]["error"]
