"""The dataset doctor over whole datasets: files, samples, runs in part, the page and the numbers on it."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.doctor import SEED, Diagnosis, diagnose, find_repeated_keys
from data_pipeline.doctor_checks import KINDS
from data_pipeline.doctor_page import render
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.manifest import Manifest, ShardInfo, ShardTable
from data_pipeline.pack import pack
from data_pipeline.reader import Dataset
from data_pipeline.records import encode_meta
from data_pipeline.shards import write_shard
from data_pipeline.sources import find_clean, find_pairs
from data_pipeline.statistics import clipped_fraction, draw, draw_places, pair_facts
from tests.support.datasets import make_dataset, make_folders, random_image

SIDE = 96


def kinds(diagnosis: Diagnosis) -> list[str]:
    return [finding.kind for finding in diagnosis.findings]


def test_a_sound_dataset_is_sound(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=10)
    diagnosis = diagnose(uri, other_uri=make_dataset(tmp_path, count=4, seed=1, name="other"))
    assert diagnosis.findings == () and diagnosis.is_sound
    assert [m.key for m in diagnosis.measurements] == [f"photo_{i:03d}" for i in range(10)]


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=9)
    flip_byte(uri, "photo_004", "input")
    one, four = diagnose(uri, jobs=1), diagnose(uri, jobs=4)
    assert one.findings == four.findings != ()
    assert [(m.key, m.facts, m.fit) for m in one.measurements] == [(m.key, m.facts, m.fit) for m in four.measurements]
    assert render(one, command="x") == render(four, command="x")


def flip_byte(uri: str, key: str, field: str) -> str:
    """Alter a byte in the middle of an image.   -> the name of the shard"""
    dataset = Dataset(uri)
    for place, entry in dataset.entries():
        if entry.key == key:
            shard = dataset.manifest.shards[place.shard_index]
            member = next(member for member in entry.members if member.field == field)
            data = bytearray((Path(uri) / shard.name).read_bytes())
            data[member.start + member.size // 2] ^= 0xFF
            (Path(uri) / shard.name).write_bytes(data)
            return shard.name
    raise AssertionError(f"no {key} in {uri}")


@pytest.mark.parametrize("is_quick", [False, True])
def test_an_altered_byte_is_found_in_its_sample_and_by_a_full_run_in_its_shard(tmp_path: Path, is_quick: bool) -> None:
    uri = make_dataset(tmp_path, count=9)
    shard = flip_byte(uri, "photo_004", "target")
    diagnosis = diagnose(uri, is_quick=is_quick)
    errors = [(finding.kind, finding.keys) for finding in diagnosis.findings if finding.severity == "error"]
    assert errors == [("hash", (shard,))] * (not is_quick) + [("altered", ("photo_004",))]
    assert not diagnosis.is_sound and len(diagnosis.measurements) == 8


@pytest.mark.parametrize("damage", ["shorter shard", "no shard", "no index", "other index", "broken index"])
def test_a_broken_shard_is_named_and_the_others_are_examined(tmp_path: Path, damage: str) -> None:
    uri = make_dataset(tmp_path, count=12, shard_mb=0.01)
    shards = Manifest.load(uri).shards
    first, second = (Path(uri) / shards[i].name for i in (0, 1))
    assert len(shards) > 2
    match damage:
        case "shorter shard":
            first.write_bytes(first.read_bytes()[:-1024])
        case "no shard":
            first.unlink()
        case "no index":
            first.with_suffix(".idx").unlink()
        case "other index":
            first.with_suffix(".idx").write_bytes(second.with_suffix(".idx").read_bytes())
        case "broken index":
            first.with_suffix(".idx").write_bytes(b"{")
    diagnosis = diagnose(uri)
    assert kinds(diagnosis)[0] == "shard" and diagnosis.findings[0].keys == (first.name,)
    assert diagnosis.subject.num_images == 12 and len(diagnosis.measurements) == 12 - shards[0].count
    looked_at = f"looked at {12 - shards[0].count} of 12 images of {uri}, {len(shards) - 1} of {len(shards)} shards"
    assert kinds(diagnosis) == ["shard", "partial"] and looked_at in diagnosis.findings[-1].text
    quick = diagnose(uri, is_quick=True)
    assert quick.subject.entries == diagnosis.subject.entries and looked_at in quick.findings[-1].text


def test_a_broken_shard_of_tiles_is_named_and_the_whole_images_are_examined(tmp_path: Path) -> None:
    make_folders(tmp_path, count=6, size=(70, 90))
    uri = str(tmp_path / "tiled")
    pack(find_clean(tmp_path / "target"), uri, tile=32, overlap=8, shard_mb=0.0015, jobs=1)
    shards = Manifest.load(uri).shards
    lost = {entry.tile.image for place, entry in Dataset(uri).entries() if place.shard_index == 0 and entry.tile}
    kept = {entry.tile.image for place, entry in Dataset(uri).entries() if entry.tile} - lost
    (Path(uri) / shards[0].index_name).unlink()
    diagnosis = diagnose(uri)
    assert kept and lost and {m.key for m in diagnosis.measurements} == kept
    assert f"{len(shards) - 1} of {len(shards)} shards of {uri}" in diagnosis.findings[-1].text


def test_a_dataset_of_which_nothing_is_left_is_reported_not_crashed_on(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=2)
    for path in Path(uri).glob("*.idx"):
        path.unlink()
    diagnosis = diagnose(uri)
    assert set(kinds(diagnosis)) == {"shard", "partial"} and diagnosis.measurements == ()
    assert f"looked at 0 of 2 images of {uri}, 0 of 1 shards" in diagnosis.findings[-1].text
    assert "not sound" in render(diagnosis, command="x")


def write_dataset(folder: Path, shards: list[list[tuple[str, bytes, tuple[int, int]]]]) -> str:
    """Clean images as they are given, one list of (key, PNG bytes, (height, width) as the index has it) a shard."""
    folder.mkdir()
    infos = []
    for number, rows in enumerate(shards):
        path = folder / f"s{number}.tar"
        records = [
            (key, {"target.png": data, "json": encode_meta(key=key, name=key, width=width, height=height)})
            for key, data, (height, width) in rows
        ]
        written = write_shard(path, records)
        path.with_suffix(".idx").write_bytes(written.index)
        widths, heights = [row[2][1] for row in rows], [row[2][0] for row in rows]
        index_sha256 = hashlib.sha256(written.index).hexdigest()
        sizes = (min(widths), max(widths), min(heights), max(heights))
        index_bytes = len(written.index)
        infos.append(ShardInfo(path.name, len(rows), written.bytes, written.sha256, index_bytes, index_sha256, *sizes))
    manifest = Manifest(ShardTable.of(infos), fields=("target",), codec="png", source_digest="0" * 64)
    manifest.save(str(folder))
    return str(folder)


def as_png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_image(seed, (SIDE, SIDE))).save(buffer, "PNG")
    return buffer.getvalue()


def test_samples_that_do_not_decode_are_unreadable_though_every_hash_fits(tmp_path: Path) -> None:
    good, size = as_png(1), (SIDE, SIDE)
    rows = [("good", good, size), ("cut", good[:200], size), ("none", b"no image", size), ("size", good, (SIDE, 50))]
    diagnosis = diagnose(write_dataset(tmp_path / "data", [rows]))
    assert [(finding.kind, finding.keys[0]) for finding in diagnosis.findings] == [
        ("unreadable", "cut"),
        ("unreadable", "none"),
        ("unreadable", "size"),
    ]
    assert f"it is {SIDE}x{SIDE}, the index says 50x{SIDE}" in diagnosis.findings[2].text


def test_a_key_in_two_shards_is_an_error(tmp_path: Path) -> None:
    size = (SIDE, SIDE)
    shards = [[("a", as_png(1), size)], [("b", as_png(2), size), ("a", as_png(3), size)]]
    [finding] = diagnose(write_dataset(tmp_path / "data", shards)).findings
    assert (finding.kind, finding.keys) == ("key", ("a",)) and "s0.tar" in finding.text and "s1.tar" in finding.text


def test_sizes_that_the_manifest_does_not_have_are_an_error(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=3, size=(40, 48))
    manifest = Manifest.load(uri)
    wrong = [info._replace(max_width=64) for info in manifest.shards]
    replace(manifest, shards=ShardTable.of(wrong)).save(uri)
    diagnosis = diagnose(uri)
    assert set(kinds(diagnosis)) == {"shard", "partial"}
    assert "does not fit the manifest (sizes" in diagnosis.findings[0].text


def test_clean_images_alone_and_tiles_are_examined_as_whole_images(tmp_path: Path) -> None:
    make_folders(tmp_path, count=5, size=(70, 90))
    whole = str(tmp_path / "whole")
    pack(find_clean(tmp_path / "target"), whole, jobs=1)
    tiled = str(tmp_path / "tiled")
    pack(find_clean(tmp_path / "target"), tiled, tile=32, overlap=8, jobs=1)
    assert Manifest.load(tiled).num_samples > 5 and Manifest.load(whole).fields == ("target",)
    plain, cut = diagnose(whole), diagnose(tiled)
    assert plain.findings == cut.findings == ()
    looks = [[(m.key, m.target.digest, m.facts.width) for m in diagnosis.measurements] for diagnosis in (plain, cut)]
    assert looks[0] == looks[1] and len(looks[0]) == 5
    assert kinds(diagnose(tiled, other_uri=whole)) == ["leak"] * 5


def test_a_limited_run_says_what_it_left_out(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=9)
    limited = diagnose(uri, limit=4)
    assert [m.key for m in limited.measurements] == [m.key for m in diagnose(uri, limit=4, jobs=1).measurements]
    assert len(limited.measurements) == 4
    assert kinds(limited) == ["partial"] and "4 of 9 images" in limited.findings[0].text
    quick = diagnose(uri, is_quick=True)
    assert len(quick.measurements) == 9 and "no shard hashes" in quick.findings[0].text


def remove_indexes(uri: str, kept: set[int]) -> None:
    for number, shard in enumerate(Manifest.load(uri).shards):
        if number not in kept:
            (Path(uri) / shard.index_name).unlink()


def test_a_quick_run_opens_no_shard_but_those_it_drew_from(tmp_path: Path) -> None:
    """The indexes of all others are gone, and nobody notices."""
    uri = make_dataset(tmp_path, count=24, shard_mb=0.01)
    drawn = {place.shard_index for place in draw_places(Dataset(uri), 3, seed=SEED)}
    number = len(Manifest.load(uri).shards)
    assert 1 <= len(drawn) <= 3 < number
    other = make_dataset(tmp_path, count=2, seed=1, name="other")
    complete = diagnose(uri, other_uri=other, is_quick=True, limit=3)
    remove_indexes(uri, drawn)
    quick = diagnose(uri, other_uri=other, is_quick=True, limit=3)
    assert kinds(quick) == ["partial"] and quick.findings == complete.findings
    assert f"3 of 24 images of {uri}, {len(drawn)} of {number} shards of {uri}" in quick.findings[0].text
    assert len(quick.measurements) == 3
    assert len([kind for kind in kinds(diagnose(uri, limit=3)) if kind == "shard"]) == number - len(drawn)
    with pytest.raises(DataError, match=f"--against {uri} is not sound: .* is incomplete"):
        diagnose(other, other_uri=uri, is_quick=True)


def test_a_limited_run_looks_at_the_same_images_quick_or_not_and_checks_all_keys(tmp_path: Path) -> None:
    size = (SIDE, SIDE)
    rows = [[(f"k{shard}-{i}", as_png(10 * shard + i), size) for i in range(3)] for shard in range(4)]
    rows[3][2] = ("k0-1", as_png(99), size)
    uri = write_dataset(tmp_path / "data", rows)
    quick, limited = diagnose(uri, is_quick=True, limit=2), diagnose(uri, limit=2)
    assert [m.key for m in quick.measurements] == [m.key for m in limited.measurements] and len(quick.measurements) == 2
    assert kinds(limited) == ["key", "partial"]
    assert limited.findings[0].text == "k0-1 is in s0.tar and in s3.tar"


def test_hashes_that_meet_by_chance_repeat_no_key(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=8, shard_mb=0.01)
    dataset = Dataset(uri)
    counts = dataset.manifest.counts.tolist()
    assert find_repeated_keys(dataset, {i: np.zeros(count, np.uint64) for i, count in enumerate(counts)}) == []
    assert find_repeated_keys(dataset, {}) == []


def test_tiles_are_joined_as_the_reader_joins_them(tmp_path: Path) -> None:
    make_folders(tmp_path, count=5, size=(70, 90))
    uri = str(tmp_path / "tiled")
    pack(find_clean(tmp_path / "target"), uri, tile=32, overlap=8, shard_mb=0.02, jobs=1)
    diagnosis = diagnose(uri)
    assert list(diagnosis.subject.entries) == Dataset(uri).images() and diagnosis.subject.num_images == 5
    assert len(diagnose(uri, limit=2).measurements) == len(diagnose(uri, limit=2, is_quick=True).measurements) == 2


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=2)
    with pytest.raises(DataError, match="is no packed dataset"):
        diagnose(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="is no packed dataset"):
        diagnose(uri, other_uri=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="--limit=-1"):
        diagnose(uri, limit=-1)
    with pytest.raises(ConfigError, match="--jobs=-1"):
        diagnose(uri, jobs=-1)


def test_progress_reaches_the_total_of_each_stage_once(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    uri = make_dataset(tmp_path, count=5, shard_mb=0.01)
    diagnose(uri, other_uri=uri, progress=lambda *step: steps.append(step))
    num_shards = len(Manifest.load(uri).shards)
    expected = [("open", done, 2 * num_shards) for done in range(1, 2 * num_shards + 1)]
    expected += [("examine", done, num_shards + 10) for done in range(1, num_shards + 11)]
    assert num_shards > 1 and steps == expected


# --- the page ----------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The attributes of every tag, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def faulty_diagnosis(tmp_path: Path) -> Diagnosis:
    make_folders(tmp_path / "f", count=10)
    folder = tmp_path / "f" / "input"
    Image.open(tmp_path / "f" / "target" / "photo_002.png").save(folder / "photo_002.png")
    uri = str(tmp_path / "data")
    pack(find_pairs(folder, tmp_path / "f" / "target"), uri, jobs=1)
    return diagnose(uri, other_uri=make_dataset(tmp_path, count=3, seed=0, name="other"))


def test_the_page_shows_the_offenders_and_loads_nothing(tmp_path: Path) -> None:
    diagnosis = faulty_diagnosis(tmp_path)
    assert kinds(diagnosis) == ["leak"] * 3 + ["identical"]
    page = render(diagnosis, command="rddm doctor data 'a <b>' --quick")
    tags = Tags(page).found
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 3 * 2 + 3
    assert all((attributes["src"] or "").startswith("data:image/jpeg;base64,") for attributes in images)
    assert not [tag for tag, attributes in tags if tag in ("script", "link", "iframe") or "href" in attributes]
    assert "http" not in page.replace("http-equiv", "")
    assert "rddm doctor data &#x27;a &lt;b&gt;&#x27; --quick" in page
    for kind in ("leak", "identical"):
        assert KINDS[kind].title in page
    assert "photo_002" in page and "not sound" in page and page.count("<svg") >= 4


def test_the_page_shows_what_decodes_of_an_altered_sample(tmp_path: Path) -> None:
    """A byte of a JPEG changes a few pixels; a PNG with one is no image any more."""
    shown = {}
    for codec in ("jpeg", "png"):
        make_folders(tmp_path / codec, count=3, mask=True)
        uri = str(tmp_path / codec / "data")
        folders = [tmp_path / codec / name for name in ("input", "target", "mask")]
        pack(find_pairs(folders[0], folders[1], mask=folders[2]), uri, codec=codec, jobs=1)
        flip_byte(uri, "photo_001", "target")
        diagnosis = diagnose(uri, is_quick=True)
        assert [finding.keys for finding in diagnosis.findings if finding.kind == "altered"] == [("photo_001",)]
        shown[codec] = [a["alt"] for tag, a in Tags(render(diagnosis, command="x")).found if tag == "img"]
    assert shown["jpeg"] == ["photo_001.input", "photo_001.target, altered", "photo_001.mask"]
    assert shown["png"] == ["photo_001.input", "photo_001.mask"]


def test_of_an_altered_image_that_was_cut_the_tile_is_shown(tmp_path: Path) -> None:
    make_folders(tmp_path, count=3, size=(70, 90))
    uri = str(tmp_path / "tiled")
    pack(find_clean(tmp_path / "target"), uri, tile=32, overlap=8, codec="jpeg", jobs=1)
    key = next(entry.key for _, entry in Dataset(uri).entries() if entry.tile and entry.tile.image == "photo_001")
    flip_byte(uri, key, "target")
    diagnosis = diagnose(uri)
    [(caption, image)] = diagnosis.subject.altered("photo_001")
    assert (caption, image.shape) == (f"{key}.target, altered", (32, 32, 3))
    assert diagnosis.subject.altered("photo_000") == []


# --- numbers -----------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_pair_are_their_definitions() -> None:
    degraded, target = random_image(1, (30, 50)), random_image(2, (30, 50))
    facts = pair_facts(degraded, target)
    residual = degraded.astype(np.float64) - target
    assert facts.residual_mean == pytest.approx(residual.mean())
    assert facts.residual_std == pytest.approx(residual.std())
    assert (facts.residual_min, facts.residual_max) == (residual.min(), residual.max())
    assert facts.psnr == pytest.approx(20 * math.log10(255 / math.sqrt((residual**2).mean())))
    assert pair_facts(target, target).psnr == math.inf


def test_clipped_values_are_those_at_both_ends() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert clipped_fraction(values) == 2 / 256
    assert clipped_fraction(values[:8]) == clipped_fraction(values[8:]) == 1 / 128


@pytest.mark.parametrize(
    ("total", "num"), [(0, 5), (1, 1), (7, 3), (7, 7), (7, 20), (1000, 499), (1000, 501), (2**31, 50)]
)
def test_a_draw_has_different_numbers_and_is_repeatable(total: int, num: int) -> None:
    drawn = draw(total, num, seed=3, purpose="test")
    assert drawn == sorted(set(drawn)) == draw(total, num, seed=3, purpose="test")
    assert len(drawn) == min(num, total) and all(0 <= number < total for number in drawn)


def test_a_draw_favours_no_number() -> None:
    counts = np.zeros(20, int)
    for seed in range(1500):
        counts[draw(20, 4, seed=seed, purpose="test")] += 1
    # Binomial(1500, 0.2): mean 300, standard deviation 15.5.
    assert counts.sum() == 6000 and abs(counts - 300).max() < 5 * 15.5
