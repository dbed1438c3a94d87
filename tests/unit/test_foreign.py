"""Indexing tars that others wrote: what is read, what is refused, and that no tar is touched."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline import foreign, storage, tarstream
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault
from data_pipeline.foreign import IndexResult, index_tars
from data_pipeline.manifest import Manifest
from data_pipeline.reader import Dataset
from data_pipeline.records import make_key
from tests.support.datasets import make_dataset, random_image
from tests.support.servers import serve_files

PAIRS = {"input": ("lq.png",), "target": ("gt.png",)}


def png(seed: int, size: tuple[int, int] = (12, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_image(seed, size)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(*names: str, seed: int = 0) -> list[tuple[str, bytes]]:
    rows = []
    for number, name in enumerate(names):
        rows += [(f"{name}.lq.png", png(seed + 2 * number)), (f"{name}.gt.png", png(seed + 2 * number + 1))]
    return rows


def link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def names_of(uri: Path | str) -> list[str]:
    return [entry.name for _, entry in Dataset(str(uri)).entries()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def test_an_indexed_webdataset_gives_its_images_and_stays_as_it_was(tmp_path: Path) -> None:
    import webdataset

    rows = pairs("img_00_x1.5", "b/photo 7", "plain")
    write_tar(tmp_path / "train-0.tar", [*rows, ("plain.json", b"{}"), ("plain.cls", b"3")])
    write_tar(tmp_path / "train-1.tar", pairs("zebra", seed=50))
    before = digests(tmp_path)
    result = index_tars(str(tmp_path), suffixes=PAIRS, jobs=2)
    assert digests(tmp_path) == before == {s.name: s.sha256 for s in result.manifest.shards}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*before, "manifest.json", "train-0.idx", "train-1.idx"]
    )
    assert Manifest.load(str(tmp_path)) == result.manifest and result.manifest.codec == "foreign"
    assert names_of(tmp_path) == ["img_00_x1.5", "b/photo 7", "plain", "zebra"]
    dataset, content = Dataset(str(tmp_path)), dict(rows)
    for offset, name in enumerate(("img_00_x1.5", "b/photo 7", "plain")):
        sample = dataset.sample(0, offset)
        assert sample.key == make_key(name)
        for image, suffix in ((sample.input, "lq.png"), (sample.target, "gt.png")):
            expected = np.asarray(Image.open(io.BytesIO(content[f"{name}.{suffix}"])))
            assert image is not None and np.array_equal(image, expected)
    rows_seen = list(webdataset.WebDataset([str(tmp_path / "train-1.tar")], shardshuffle=False))
    assert [(row["__key__"], row["lq.png"]) for row in rows_seen] == [("zebra", png(50))]


def test_indexing_again_reuses_and_a_changed_tar_is_indexed_anew(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs("x", "y"))
    first = index_tars(str(tmp_path), suffixes=PAIRS)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = index_tars(str(tmp_path), suffixes=PAIRS)
    assert (first.reused, again.reused) == (False, True) and again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    write_tar(tmp_path / "a.tar", pairs("x", "z"))
    changed = index_tars(str(tmp_path), suffixes=PAIRS)
    assert not changed.reused and names_of(tmp_path) == ["x", "z"]
    assert changed.manifest.fingerprint != first.manifest.fingerprint


def test_clean_images_alone_masks_alternatives_and_any_case(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.fromarray(random_image(3, (12, 20))).save(jpeg, "JPEG")
    members = [("a.JPG", jpeg.getvalue()), ("b.png", png(1)), ("c.gt.png", png(2)), ("._a.jpg", b"junk"), (".png", b"")]
    write_tar(tmp_path / "clean.tar", members)
    result = index_tars(str(tmp_path), suffixes={"target": ("jpg", ".png")})
    assert result.manifest.fields == ("target",) and names_of(tmp_path) == ["a", "b", "c.gt"]
    assert Dataset(str(tmp_path)).sample(0, 0).input is None
    folder = tmp_path / "masked"
    folder.mkdir()
    write_tar(folder / "m.tar", [*reversed(pairs("a")), ("a.m.png", png(9))])
    result = index_tars(str(folder), suffixes={**PAIRS, "mask": ("m.png",)})
    assert result.manifest.has_mask and Dataset(str(folder)).sample(0, 0).mask is not None


def test_of_two_suffixes_that_fit_the_longer_counts(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.png", png(0)), ("x.gt.png", png(1))])
    index_tars(str(tmp_path), suffixes={"input": ("png",), "target": ("gt.png",)})
    assert names_of(tmp_path) == ["x"]


def test_names_repeated_across_tars_get_the_tar_in_front_everywhere(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs("x", "only"))
    write_tar(tmp_path / "b.tar", pairs("x", seed=9))
    index_tars(str(tmp_path), suffixes=PAIRS)
    assert names_of(tmp_path) == ["a/x", "a/only", "b/x"]
    assert len({entry.key for _, entry in Dataset(str(tmp_path)).entries()}) == 3


def test_samples_that_are_not_whole_are_listed_or_left_out(tmp_path: Path) -> None:
    members = [*pairs("good"), ("half.lq.png", png(1)), ("odd.lq.png", png(2)), ("odd.gt.png", png(3, (20, 12)))]
    members += [("junk.lq.png", png(4)), ("junk.gt.png", b"nothing"), *((f"n{i}.gt.png", png(i)) for i in range(4))]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "none.tar", [("q.gt.png", png(4))])
    with pytest.raises(DataError, match=r"^8 sample\(s\) are not whole: .*'odd': its images differ.*--skip-incomplete"):
        index_tars(str(tmp_path), suffixes=PAIRS)
    assert not (tmp_path / "manifest.json").exists()
    result = index_tars(str(tmp_path), suffixes=PAIRS, skip_incomplete=True)
    assert (result.left_out, result.resumed) == (8, 2) and names_of(tmp_path) == ["good"]
    assert [shard.name for shard in result.manifest.shards] == ["a.tar"]


def test_what_was_read_before_an_interruption_is_not_read_again(tmp_path: Path) -> None:
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", pairs(name))
    good = (tmp_path / "c.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(good[:700])
    with pytest.raises(DataError, match=r"c\.tar cannot be used: it is cut short"):
        index_tars(str(tmp_path), suffixes=PAIRS, jobs=1)
    (tmp_path / "c.tar").write_bytes(good)
    (tmp_path / "b.idx.partial").write_bytes(b"{}")  # a damaged one does not count
    read: list[tuple[int, int]] = []
    result = index_tars(str(tmp_path), suffixes=PAIRS, jobs=1, progress=lambda *at: read.append(at))
    assert result.resumed == 1 and names_of(tmp_path) == ["a", "b", "c"]
    assert read[-1][0] == read[-1][1] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_known_of_each_tar_is_removed_by_threads_when_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, a hundred thousand tars of an object store would take hours."""
    removed: dict[str, str] = {}
    remove = storage.remove

    def spy(uri: str) -> None:
        removed[uri.rpartition("/")[2]] = threading.current_thread().name
        assert (tmp_path / "manifest.json").exists() or uri.endswith("/.probe.idx.partial")
        remove(uri)

    monkeypatch.setattr(storage, "remove", spy)
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", pairs(name))
    index_tars(str(tmp_path), suffixes=PAIRS, jobs=2)
    del removed[".probe.idx.partial"]
    assert sorted(removed) == [f"{name}.idx.partial" for name in "abc"]
    assert all(name.startswith("index") for name in removed.values())
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupt_stops_all_threads_and_is_passed_on(tmp_path: Path) -> None:
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", pairs(name))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_tars(str(tmp_path), suffixes=PAIRS, jobs=2, progress=interrupt)
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar"}


def raw_header(
    name: bytes = b"x.lq.png", *, size: bytes = b"00000000000", kind: bytes = b"0", **fields: tuple[int, bytes]
) -> bytes:
    """A header with a checksum that fits.   fields: (where, bytes) of others"""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512])
    for start, value in fields.values():
        block[start : start + len(value)] = value
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)


def pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (key, value)
    length = next(n for n in range(100_000) if n == len(rest) + len(str(n)))
    return b"%d" % length + rest


def pax_header(body: bytes, *, kind: bytes = b"x") -> bytes:
    return raw_header(b"pax", size=b"%011o" % len(body), kind=kind) + body.ljust(-(-len(body) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no tar"),
        (b"\x1f\x8b" + bytes(600), "compressed"),
        (b"x" * 2000, "wrong checksum"),
        (raw_header(b"/etc/x.txt") + END, "leads out of the archive"),
        (raw_header(b"a/../../x.txt") + END, "leads out of the archive"),
        (raw_header(b"a\nb") + END, "control characters"),
        (raw_header(size=b"-0000000001") + END, "no proper size"),
        (raw_header(size=b"\xff" * 12) + END, "no proper size"),
        (raw_header(size=b"\x80" + b"\xff" * 11) + END, "cut short"),
        (raw_header(size=b"77777777777") + END, "cut short"),
        (raw_header(kind=b"2") + END, "is a link or device"),
        (raw_header(kind=b"3") + END, "is a link or device"),
        (raw_header(b"x.txt", kind=b"2", size=b"00000001000") + bytes(512) + END, "device with content"),
        (raw_header(b"x.txt", owner=(108, b"nobody")) + END, "is no number"),
        (raw_header(b"x.txt", magic=(257, b"ustar  \0"), prefix=(345, b"d")) + END, "a prefix to its name"),
        (raw_header(b"x.txt", kind=b"S") + END, "sparse"),
        (raw_header(b"x.txt", kind=b"M") + END, "unknown kind"),
        (pax_header(pax_record(b"GNU.sparse.major", b"1")) + raw_header() + END, "sparse"),
        (pax_header(pax_record(b"path", b"../x.txt")) + raw_header() + END, "leads out"),
        (pax_header(pax_record(b"size", b"-5")) + raw_header() + END, "no proper size"),
        (pax_header(pax_record(b"size", b"9" * 19)) + raw_header() + END, "cut short"),
        (pax_header(b"99 path=x\n") + raw_header() + END, "damaged"),
        (pax_header(pax_record(b"path", b"x"), kind=b"g") + raw_header() + END, "global"),
        (pax_header(pax_record(b"path", b"x")) + END, "cut short"),
        (pax_header(pax_record(b"path", b"x")) * 2 + raw_header() + END, "two extension headers"),
        (raw_header(b"L", kind=b"L", size=b"77777777777") + END, "extension header"),
        (raw_header(b"x.txt"), "without the mark of its end"),
        (raw_header(b"x.txt") + END + raw_header() + END, "data follows after the end"),
    ],
)
def test_odd_tars_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        index_tars(str(tmp_path), suffixes=PAIRS)
    assert "\n" not in str(caught.value) and str(tmp_path / "a.tar") in str(caught.value)


def test_repeated_images_and_oversized_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", [*pairs("x"), *pairs("x")])
    with pytest.raises(DataError, match=r"a\.tar cannot be used: 'x\.lq\.png' gives the input of its sample a second"):
        index_tars(str(tmp_path), suffixes=PAIRS)
    write_tar(tmp_path / "a.tar", pairs("x"))
    monkeypatch.setattr(foreign, "MAX_MEMBER_BYTES", 10)
    with pytest.raises(DataError, match="at most 10 are allowed"):
        index_tars(str(tmp_path), suffixes=PAIRS)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_from_every_kind_of_tar(tmp_path: Path, form: int) -> None:
    names = ["d" * 90 + "/" + "f" * 80, "./dotted/a", "gr\u00fc\u00df"]
    write_tar(tmp_path / "a.tar", [(link("harmless.txt"), b""), *pairs(*names)], format=form)
    index_tars(str(tmp_path), suffixes=PAIRS)
    assert names_of(tmp_path) == [names[0], "dotted/a", names[2]]
    with tarfile.open(tmp_path / "a.tar") as tar:
        starts = {info.name: info.offset_data for info in tar}
    for (_, entry), name in zip(Dataset(str(tmp_path)).entries(), names, strict=True):
        assert [m.start for m in entry.members] == [starts[f"{name}.lq.png"], starts[f"{name}.gt.png"]]


def test_names_that_cannot_be_shards_and_files_of_others_are_refused(tmp_path: Path) -> None:
    def refused(message: str, pattern: str = "*.tar") -> None:
        with pytest.raises(DataError, match=message):
            index_tars(str(tmp_path), suffixes=PAIRS, pattern=pattern)

    refused(r"nothing that matches --pattern=\*\.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    refused("compressed tars")
    write_tar(tmp_path / "a.tar", pairs("x"))
    refused("compressed tars", pattern="*")
    (tmp_path / "a b.tar").write_bytes(b"")
    refused("'a b.tar' cannot be a shard")
    (tmp_path / "a.idx").write_text("v1.2 1\n")
    refused("a.idx, which another program wrote", pattern="a.tar")
    with pytest.raises(DataError, match="is a file"):
        index_tars(str(tmp_path / "a.tar"), suffixes=PAIRS)
    assert (tmp_path / "a.idx").read_text() == "v1.2 1\n"


def test_a_packed_dataset_is_not_overwritten(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path)
    before = {path: path.read_bytes() for path in Path(uri).iterdir()}
    with pytest.raises(DataError, match="that rddm pack wrote"):
        index_tars(uri, suffixes={"input": ("input.png",), "target": ("target.png",)})
    assert {path: path.read_bytes() for path in Path(uri).iterdir()} == before
    (Path(uri) / "manifest.json").unlink()
    index_tars(uri, suffixes={"input": ("input.png",), "target": ("target.png",)})
    assert len(names_of(uri)) == 6


@pytest.mark.parametrize(
    "suffixes, message",
    [
        ({}, "--target-suffix alone"),
        ({"input": ("lq.png",)}, "--target-suffix alone"),
        ({"target": ("gt.png",), "mask": ("m.png",)}, "--target-suffix alone"),
        ({"target": ("",)}, "is no suffix"),
        ({"target": ("gt.pickle",)}, "does not end in an image format"),
        ({"input": ("png",), "target": ("png",)}, "given twice"),
    ],
)
def test_suffixes_that_make_no_sense_are_refused(
    tmp_path: Path, suffixes: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        index_tars(str(tmp_path), suffixes=suffixes)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs("x"))
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(EnvironmentFault, match="link or copy the tars"):
            index_tars(str(tmp_path), suffixes=PAIRS)
    finally:
        tmp_path.chmod(0o755)


def test_a_server_that_takes_no_files_is_said_at_once(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs("x")).read_bytes()
    listing = b'<html><a href="a.tar">a.tar</a></html>'
    with (
        serve_files({"/d": listing, "/d/": listing, "/d/a.tar": tar}) as server,
        pytest.raises(
            EnvironmentFault, match="/d cannot be written .* link or copy the tars into a folder of your own"
        ),
    ):
        index_tars(f"{server.url}/d", suffixes=PAIRS)
    assert server.bytes_served < len(tar)


def test_a_url_is_indexed_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarstream, "CHUNK_BYTES", 1000)
    write_tar(tmp_path / "a.tar", pairs("x", "y"))
    uri = f"memory://{tmp_path.name}"
    storage.write_bytes_atomic(f"{uri}/a.tar", (tmp_path / "a.tar").read_bytes())
    remote: IndexResult = index_tars(uri, suffixes=PAIRS)
    assert storage.list_names(uri) == ["a.idx", "a.tar", "manifest.json"]
    assert index_tars(str(tmp_path), suffixes=PAIRS).manifest == remote.manifest == Manifest.load(uri)


def test_the_command_says_what_came_of_it(tmp_path: Path) -> None:
    import typer

    from rddm_dist.cli import index

    app = typer.Typer()
    index.register(app)
    write_tar(tmp_path / "a.tar", [*pairs("x", "y"), ("half.lq.png", png(1))])
    command = [str(tmp_path), "--input-suffix", "lq.png", "--target-suffix", "gt.png,gt.jpg"]
    result = CliRunner().invoke(app, [*command, "--skip-incomplete"])
    assert result.exit_code == 0, result.output
    assert f"indexed {tmp_path}: 2 samples in 1 shard(s)" in result.output and "1 sample(s) left out" in result.output
    assert isinstance(CliRunner().invoke(app, command).exception, DataError)
