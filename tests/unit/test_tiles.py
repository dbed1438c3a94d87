"""Tiles: they cover an image with the overlap asked for, and a tiled dataset gives back the whole images."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import pack as pack_course
from data_pipeline import pack_jobs, storage
from data_pipeline.decode import Window, decode_image
from data_pipeline.degradations import Degradation, parse_degradation
from data_pipeline.errors import BadSample, ConfigError, DataError
from data_pipeline.index import Tile
from data_pipeline.manifest import Manifest, Tiling
from data_pipeline.pack import pack
from data_pipeline.pack_output import STAGING
from data_pipeline.reader import Dataset
from data_pipeline.records import encode_image, encode_meta
from data_pipeline.rng import permutation, stable_id
from data_pipeline.shards import write_shard
from data_pipeline.sources import find_clean, find_pairs
from data_pipeline.tiles import assemble, plan_tiles
from tests.support.datasets import make_dataset, make_folders, random_image


@pytest.mark.parametrize("size, overlap", [(16, 0), (16, 5), (7, 6), (40, 0), (64, 32), (1, 0)])
@pytest.mark.parametrize("height, width", [(40, 48), (16, 17), (1, 100), (64, 64)])
def test_tiles_cover_the_image_once_around_and_overlap_enough(size: int, overlap: int, height: int, width: int) -> None:
    windows = plan_tiles(height, width, size=size, overlap=overlap)
    assert len(set(windows)) == len(windows)
    image = random_image(height * width, (height, width))
    assert np.array_equal(assemble([(w, w.cut(image)) for w in windows], height=height, width=width), image)
    for w in windows:
        assert (w.height, w.width) == (min(size, height), min(size, width))
        assert w.top >= 0 and w.left >= 0 and w.bottom <= height and w.right <= width
    for length, starts in ((height, {w.top for w in windows}), (width, {w.left for w in windows})):
        ordered = sorted(starts)
        assert all(low + min(size, length) - high >= overlap for low, high in zip(ordered, ordered[1:], strict=False))
        # One tile fewer could not cover the side with that overlap.
        fewer = len(ordered) - 1
        assert fewer == 0 or min(size, length) + (fewer - 1) * (size - overlap) < length


def test_impossible_tiles_and_holes_are_refused() -> None:
    for size, overlap in ((0, 0), (16, 16), (16, -1)):
        with pytest.raises(ConfigError, match=f"--tile={size} with --overlap={overlap}"):
            plan_tiles(40, 48, size=size, overlap=overlap)
    with pytest.raises(BadSample, match="the tiles leave 192 of 256 pixels open"):
        assemble([(Window(0, 0, 8, 8), np.zeros((8, 8, 3), np.uint8))], height=16, width=16)


@pytest.mark.parametrize("codec", ["auto", "webp", "raw"])
@pytest.mark.parametrize("tile, overlap", [(32, 0), (20, 7), (100, 10)])
def test_a_tiled_dataset_gives_back_the_whole_images(tmp_path: Path, codec: str, tile: int, overlap: int) -> None:
    options: dict[str, Any] = {"count": 4, "mask": True, "codec": codec, "tile": tile, "overlap": overlap}
    uri = make_dataset(tmp_path, **options)
    dataset = Dataset(uri)
    assert dataset.manifest.tiling == Tiling(tile, overlap)
    assert dataset.manifest.num_samples == 4 * len(plan_tiles(40, 48, size=tile, overlap=overlap))
    assert dataset.manifest.max_width <= tile and dataset.manifest.max_height <= tile
    entries = dataset.images()
    assert [(entry.key, entry.width, entry.height) for entry in entries] == [(f"photo_00{i}", 48, 40) for i in range(4)]
    for entry in entries:
        whole = dataset.whole(entry)
        for field, image in (("input", whole.input), ("target", whole.target), ("mask", whole.mask)):
            data = (tmp_path / "data-source" / field / f"{entry.key}.png").read_bytes()
            assert np.array_equal(image, decode_image(data, "png", channels=1 if field == "mask" else 3))


def test_tiles_hold_their_window_and_have_keys_of_their_own(tmp_path: Path) -> None:
    """An image may be called what a tile of another one is called."""
    _, targets = make_folders(tmp_path / "source", count=1)
    (targets / "photo_000.png").rename(targets / "a.png")
    make_folders(tmp_path / "source", count=1, seed=1)
    (targets / "photo_000.png").rename(targets / "a-0001.png")
    images = {path.stem: decode_image(path.read_bytes(), "png", channels=3) for path in targets.iterdir()}
    pack(find_clean(targets), str(tmp_path / "data"), tile=24, jobs=1)
    dataset = Dataset(str(tmp_path / "data"))
    found = list(dataset.entries())
    keys = [entry.key for _, entry in found]
    assert len(set(keys)) == len(keys) == 8 and {"a-0001", "a-0001-0001"} <= set(keys)
    for place, entry in found:
        assert entry.tile is not None
        window = Window(entry.tile.top, entry.tile.left, entry.height, entry.width)
        assert np.array_equal(dataset.sample(*place).target, window.cut(images[entry.tile.image]))
        assert entry.name == f"{entry.tile.image}@{entry.tile.left},{entry.tile.top}"
    for entry in dataset.images():
        sample = dataset.whole(entry)
        assert np.array_equal(sample.target, images[sample.name])


def test_a_degradation_is_the_same_tiled_and_whole(tmp_path: Path) -> None:
    _, targets = make_folders(tmp_path / "source", count=2)
    spec = "blur(sigma=2)+noise(sigma=25)+inpaint(mask=box)"
    for name, options in (("whole", {}), ("tiled", {"tile": 24, "overlap": 6})):
        pack(find_clean(targets), str(tmp_path / name), degrade=spec, jobs=1, **options)
    whole, tiled = Dataset(str(tmp_path / "whole")), Dataset(str(tmp_path / "tiled"))
    assert len(whole.images()) == len(tiled.images()) == 2
    for one, other in zip(whole.images(), tiled.images(), strict=True):
        a, b = whole.whole(one), tiled.whole(other)
        assert a.key == b.key and np.array_equal(a.target, b.target)
        assert np.array_equal(a.input, b.input) and np.array_equal(a.mask, b.mask)


SPEC = "blur(sigma=2)+noise(sigma=25)+inpaint(mask=box)"


def _tile_by_tile(targets: Path, folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The shards of a degraded dataset of tiles, each tile made of its image for itself.   -> file name -> content"""
    assert manifest.tiling is not None
    tiles = []
    for pair in find_clean(targets):
        height, width, _ = decode_image(pair.target.read_bytes(), "png", channels=3).shape
        for number, window in enumerate(plan_tiles(height, width, **manifest.tiling._asdict())):
            tiles.append((f"{pair.key}-{number:04d}", pair, window))
    tiles = [tiles[i] for i in permutation(3, len(tiles), "pack")]
    records = []
    for key, pair, window in tiles:
        target = decode_image(pair.target.read_bytes(), "png", channels=3)
        height, width, _ = target.shape
        ids = np.array([stable_id(pair.key)])
        inputs, masks = parse_degradation(SPEC).apply(target[None], seed=3, ids=ids)
        assert masks is not None
        tile = Tile(pair.name, window.left, window.top, width, height)._asdict()
        name, size = f"{pair.name}@{window.left},{window.top}", {"width": window.width, "height": window.height}
        members = {"json": encode_meta(key=key, name=name, **size, tile=tile)}
        for field, image in (("input", inputs[0]), ("target", target), ("mask", masks[0])):
            extension, members_bytes = encode_image(window.cut(image), manifest.codec)
            members[f"{field}.{extension}"] = members_bytes
        records.append((key, members))
    content: dict[str, bytes] = {}
    start = 0
    folder.mkdir()
    for shard in manifest.shards:
        written = write_shard(folder / shard.name, records[start : start + shard.count])
        content |= {shard.name: (folder / shard.name).read_bytes(), shard.index_name: written.index}
        start += shard.count
    return content


@pytest.mark.parametrize("place", ["folder", "url"])
@pytest.mark.parametrize("pixels", [1, 4000, pack_course.CUT_PIXELS])
def test_every_image_is_made_once_however_many_tiles_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, pixels: int
) -> None:
    """Decoded twice: when it is checked and when it is cut. The bytes are those of tiles made one by one."""
    _, targets = make_folders(tmp_path / "source", count=5)
    calls: Counter[str] = Counter()

    def decode(*arguments: Any, **options: Any) -> np.ndarray:
        calls["decode"] += 1
        return decode_image(*arguments, **options)

    degrade_whole = Degradation.apply

    def degrade(*arguments: Any, **options: Any) -> Any:
        calls["degrade"] += 1
        return degrade_whole(*arguments, **options)

    out = str(tmp_path / "data") if place == "folder" else f"memory://{uuid.uuid4().hex}/data"
    with monkeypatch.context() as patch:
        patch.setattr(pack_jobs, "decode_image", decode)
        patch.setattr(Degradation, "apply", degrade)
        patch.setattr(pack_course, "CUT_PIXELS", pixels)
        options: dict[str, Any] = {"degrade": SPEC, "tile": 16, "overlap": 3, "seed": 3, "shard_mb": 0.02}
        manifest = pack(find_clean(targets), out, jobs=2, **options).manifest
    assert calls == {"decode": 10, "degrade": 5} and manifest.num_samples == 5 * 12 and len(manifest.shards) > 3
    names = storage.list_names(out)
    content = {name: storage.read_bytes(storage.join(out, name)) for name in names}
    assert content.pop("manifest.json") == manifest.to_json()
    assert content == _tile_by_tile(targets, tmp_path / "one-by-one", manifest)


@pytest.mark.parametrize("calls", [2, 4, 7])
def test_an_interrupted_tiling_goes_on_without_doing_again_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Reports: after the check, after each of five images, before the first shard, after each shard."""
    _, targets = make_folders(tmp_path / "source", count=5)
    options: dict[str, Any] = {"tile": 16, "codec": "webp", "shard_mb": 0.01, "jobs": 1}
    pack(find_clean(targets), str(tmp_path / "whole"), **options)
    monkeypatch.setattr(pack_course, "CUT_PIXELS", 1)
    reports: list[int] = []

    def stop(done: int, total: int) -> None:
        reports.append(done)
        if len(reports) == calls:
            raise KeyboardInterrupt

    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        pack(find_clean(targets), str(out), progress=stop, **options)
    cut = len(list((out / STAGING).glob("cut-*.json")))
    assert cut >= min(calls - 1, 5)
    decoded: list[int] = []

    def decode(*arguments: Any, **options: Any) -> np.ndarray:
        decoded.append(1)
        return decode_image(*arguments, **options)

    monkeypatch.setattr(pack_jobs, "decode_image", decode)
    reports.clear()
    pack(find_clean(targets), str(out), progress=lambda done, total: reports.append(done), **options)
    assert len(decoded) == 5 - cut and reports == sorted(reports) and reports[-1] == 5
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1]


def test_tiles_of_another_pack_make_room(tmp_path: Path) -> None:
    _, targets = make_folders(tmp_path / "source", count=3)
    out = tmp_path / "data"
    seen: list[set[str]] = []

    def look(done: int, total: int) -> None:
        seen.append({path.name for path in (out / STAGING).glob("cut-*")})
        if len(seen) == 3:
            raise KeyboardInterrupt

    for tile in (16, 24):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            pack(find_clean(targets), str(out), tile=tile, jobs=1, progress=look)
        assert len(seen[-1]) == 2
    pack(
        find_clean(targets),
        str(out),
        jobs=1,
        progress=lambda done, total: seen.append({path.name for path in out.rglob("cut-*")}),
    )
    assert seen[-1] == set()


def test_waiting_tiles_that_were_cut_short_are_named(tmp_path: Path) -> None:
    _, targets = make_folders(tmp_path / "source", count=3)
    out = tmp_path / "data"

    def cut_short(done: int, total: int) -> None:
        for path in (out / STAGING).glob("cut-*.bin"):
            path.write_bytes(b"short")

    with pytest.raises(DataError, match=r"cut-.*-000000\.bin was removed or cut short while it was in use; pack again"):
        pack(find_clean(targets), str(out), tile=16, jobs=1, progress=cut_short)
    assert not out.exists()


def test_real_photographs_come_back_from_their_tiles(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "polyu"
    if not folder.is_dir():
        pytest.skip("polyu is not among the real images")
    pairs = find_pairs(folder / "noisy", folder / "clean")[:2]
    pack(pairs, str(tmp_path / "data"), codec="raw", tile=200, overlap=16, jobs=2)
    dataset = Dataset(str(tmp_path / "data"))
    for entry, pair in zip(dataset.images(), pairs, strict=True):
        whole = dataset.whole(entry)
        assert np.array_equal(whole.input, decode_image(pair.files["input"].read_bytes(), "jpg", channels=3))
        assert np.array_equal(whole.target, decode_image(pair.target.read_bytes(), "jpg", channels=3))
