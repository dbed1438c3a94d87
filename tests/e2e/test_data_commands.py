"""The commands that look at a dataset: exit codes, what they say and what they leave behind."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.manifest import Manifest
from rddm_dist.cli import main as entry
from tests.support.datasets import make_dataset
from tests.support.processes import Finished

Command = Callable[..., Finished]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run the command line in this process, in tmp_path. No exit code but those of a user's errors ends in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["rddm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        captured = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int) and "Traceback" not in captured.err + captured.out
        return Finished(code, captured.out, captured.err)

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
