"""The commands that look at a dataset: exit codes, what they say and what they leave behind."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline import storage
from data_pipeline.manifest import Manifest
from rddm_dist.cli.dataset import check_output
from rddm_dist.cli.progress import ProgressBar
from tests.e2e.conftest import Here
from tests.support.datasets import make_dataset, random_image
from tests.support.processes import RDDM, Finished, finish, run, start

Command = Callable[..., Finished]


@pytest.fixture
def command(here: Here, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in this process, in tmp_path. No exit code but those of a user's errors ends in one line."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Finished:
        result = here(*arguments)
        assert "Traceback" not in result.text
        return result

    return call


def refusal(result: Finished) -> str:
    """The one line of a refused command."""
    assert result.code == 2, result.text
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_sound_dataset_passes_with_a_page(command: Command, tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=9)
    result = command("doctor", "data", uri)
    assert result.code == 0, result.text
    assert f"{uri} is sound: 9 of 9 image(s) looked at" in result.stdout and "page: doctor.html" in result.stdout
    assert f"rddm doctor data {uri} --out doctor.html" in (tmp_path / "doctor.html").read_text()


def test_an_altered_dataset_and_a_leak_end_with_3(command: Command, tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=9)
    result = command("doctor", "data", uri, "--against", uri, "--quick", "--jobs", 1, "--out", "page.html")
    assert result.code == 3 and "ERROR    Leaks: 9" in result.stdout and "and 5 more" in result.stdout, result.text
    assert f"{uri} is NOT sound" in result.stdout
    assert f"rddm doctor data {uri} --quick --against {uri} --out page.html" in (tmp_path / "page.html").read_text()
    shard = Path(uri) / Manifest.load(uri).shards[0].name
    shard.write_bytes(shard.read_bytes()[:-512])
    result = command("doctor", "data", uri)
    assert result.code == 3 and "ERROR    Broken shards: 1" in result.stdout, result.text
    assert shard.name in result.stdout


@pytest.mark.parametrize("words", [("doctor", "data"), ("data", "show"), ("data", "stats")])
def test_what_is_no_dataset_is_refused_in_one_line(command: Command, tmp_path: Path, words: tuple[str, str]) -> None:
    assert "nowhere is no packed dataset" in refusal(command(*words, tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("doctor", "data"), ("data", "show")])
def test_an_output_that_cannot_be_is_refused_before_any_work(
    command: Command, tmp_path: Path, words: tuple[str, str]
) -> None:
    uri = make_dataset(tmp_path, count=1)
    result = command(*words, uri, "--out", "absent/file")
    assert "there is no folder absent" in refusal(result) and result.stdout == ""
    assert "is a folder" in refusal(command(*words, uri, "--out", tmp_path))


@pytest.mark.parametrize("words", [("doctor", "data"), ("data", "show")])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc/file.html", "--out /proc/file.html cannot be written"),  # not even root may
        ("http://127.0.0.1:9/page.html", "--out http://127.0.0.1:9/page.html cannot be written, servers of http take"),
        ("https://x.invalid/page.html", "give a file or an s3:// URL"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    command: Command, tmp_path: Path, words: tuple[str, str], out: str, message: str
) -> None:
    """Also where there is no dataset: the output is looked at first."""
    result = command(*words, make_dataset(tmp_path, count=1), "--out", out)
    assert message in refusal(result) and result.stdout == ""
    assert message in refusal(command(*words, tmp_path / "nowhere", "--out", out))


def test_looking_whether_an_output_can_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    for name in ("old.html", "new.html"):
        check_output(str(tmp_path / name))
    memory = f"memory://{tmp_path.name}"
    check_output(f"{memory}/page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"] and storage.list_names(memory) == []
    assert (tmp_path / "old.html").read_text() == "old"


def test_the_verdict_is_told_though_the_page_cannot_be_written_in_the_end(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the page is gone when the dataset has been examined."""
    uri, folder = make_dataset(tmp_path, count=2), tmp_path / "pages"
    folder.mkdir()
    monkeypatch.setattr(ProgressBar, "update", lambda *_: shutil.rmtree(folder, ignore_errors=True))
    result = command("doctor", "data", uri, "--out", folder / "page.html")
    assert result.code == 2 and f"{uri} is sound: 2 of 2 image(s) looked at" in result.stdout, result.text
    assert "page.html cannot be written" in result.stderr.splitlines()[-1] and "page: " not in result.stdout


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Ctrl-C interrupts this process and those it starts, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("words", [("doctor", "data"), ("data", "stats")])
def test_an_interrupted_command_says_so_and_ends_with_130(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str]
) -> None:
    uri = make_dataset(tmp_path, count=9)
    monkeypatch.setattr(ProgressBar, "update", lambda *_: signal.raise_signal(signal.SIGINT))
    result = command(*words, uri)
    assert (result.code, result.stdout, result.stderr) == (130, "", "interrupted\n")
    assert not (tmp_path / "doctor.html").exists()


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupted_index_keeps_what_it_knows_and_goes_on(tmp_path: Path) -> None:
    """The second tar is a hole of many gigabytes, so that there is time to interrupt."""
    buffer = io.BytesIO()
    Image.fromarray(random_image(1, (12, 20))).save(buffer, "PNG")
    for name in "ab":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member in (f"{name}.lq.png", f"{name}.gt.png"):
                info = tarfile.TarInfo(member)
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    good, hole = (tmp_path / "b.tar").read_bytes(), tarfile.TarInfo("hole.bin")
    hole.size = 1 << 38
    (tmp_path / "b.tar").write_bytes(hole.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "b.tar", 512 + hole.size + 1024)
    line = [*RDDM, "index", str(tmp_path), "--input-suffix", "lq.png", "--target-suffix", "gt.png", "--jobs", "1"]
    process = start(line, cwd=tmp_path)
    deadline = time.monotonic() + 60.0
    while not (tmp_path / "a.idx.partial").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stopped = finish(process, timeout_s=30)
    assert stopped.code == 75 and stopped.stderr == "", stopped.text
    assert "what is known of the tars read is kept, the same command goes on" in stopped.stdout.splitlines()[-1]
    (tmp_path / "b.tar").write_bytes(good)
    resumed = run(line, cwd=tmp_path)
    assert resumed.code == 0 and "2 samples in 2 shard(s)" in resumed.stdout, resumed.text
    assert "1 shard(s) known from an interrupted run" in resumed.stdout


def test_data_show_writes_a_sheet_and_says_where(command: Command, tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=5, mask=True)
    result = command("data", "show", uri, "--num", 2, "--seed", 4)
    assert (result.code, result.stdout) == (0, "2 sample(s): sheet.png\n"), result.text
    first = (tmp_path / "sheet.png").read_bytes()
    assert Image.open(tmp_path / "sheet.png").width > 4 * 256
    assert command("data", "show", uri, "--num", 2, "--seed", 4, "--out", "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == first


def test_data_stats_says_what_the_dataset_holds(command: Command, tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, count=5, size=(40, 48))
    result = command("data", "stats", uri, "--full")
    assert result.code == 0, result.text
    said = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    for name, value in {"pairs": "5", "fields": "input, target", "sizes": "48x40 to 48x40", "tiling": "none"}.items():
        assert re.fullmatch(rf"{name} +{value}", said[name])
    assert "of 5 of 5 samples: 48x40 (5)" in result.stdout
    mean, low, high = (float(number) for number in re.findall(r"-?\d+\.\d+", said["PSNR of inputs"]))
    # Noise of standard deviation 10, a little of it clipped away.
    assert 27.5 < low <= mean <= high < 30.0


def test_the_doctor_of_the_machine_still_takes_its_option(command: Command, tmp_path: Path) -> None:
    result = command("doctor", "--storage", tmp_path / "runs")
    assert "disk for runs" in result.stdout and str(tmp_path) in result.stdout
    assert result.code in (0, 2) and ("ready to train" in result.stdout) == (result.code == 0)
    unfit = command("doctor", "--storage", "/proc/nothing")
    assert unfit.code == 2 and "FIX  disk for runs" in unfit.stdout, unfit.text


@pytest.mark.parametrize("words", [("doctor",), ("doctor", "data"), ("data",), ("data", "show"), ("data", "stats")])
def test_help_fits_a_screen_and_shows_an_example(command: Command, words: tuple[str, ...]) -> None:
    result = command(*words, "--help")
    assert result.code == 0
    assert f"Example: rddm {' '.join(words)}" in re.sub(r"\s+", " ", result.stdout)
    assert len(result.stdout.splitlines()) <= 40
