"""`rddm evaluate`, `score` and `compare` as a user runs them: sources, curves, sets, others' images, interruption."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import storage
from tests.e2e.conftest import Here
from tests.support.datasets import make_dataset
from tests.support.evaluation import feature_network, lpips_network, tiny_generator, tiny_model
from tests.support.processes import RDDM, Finished, finish, kill_group, start
from tests.support.servers import lead_to, make_bucket, s3_server, wait_until

pytestmark = pytest.mark.timeout(120)

COUNT = 4


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.safetensors, data/ packed from data-source/{input,target,mask}, and feature networks."""
    folder = tmp_path_factory.mktemp("room")
    tiny_model(folder)
    make_dataset(folder, count=COUNT, mask=True)
    feature_network(folder)
    lpips_network(folder)
    return folder


@pytest.fixture
def here(here: Here) -> Here:
    """Run the command line in this process, in tmp_path; it must end with this exit code."""

    def call(*arguments: object, code: int = 0) -> Finished:
        result = here(*arguments)
        assert result.code == code, result.text
        return result

    return call


def evaluate(room: Path, *more: object, out: object, model: object = "") -> tuple[object, ...]:
    """The command on the packed dataset of the room, in this process."""
    return (
        "evaluate",
        model or room / "model.safetensors",
        "--data",
        room / "data",
        "--actors",
        0,
        "--out",
        out,
        *more,
    )


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def command_in(folder: Path) -> list[str]:
    """The words of the command that a report tells to reproduce it."""
    return shlex.split(html.unescape(re.findall(r"<pre>(rddm .*?)</pre>", (folder / "index.html").read_text())[0]))


def test_folders_lists_and_packed_data_are_scored_alike(room: Path, tmp_path: Path, here: Here) -> None:
    source = room / "data-source"
    pairs = [f"{folder}/photo_{number:03d}.png" for number in range(COUNT) for folder in ("input", "target")]
    rows = ["input\ttarget", *("\t".join(pairs[i : i + 2]) for i in range(0, len(pairs), 2))]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n")
    forms = {
        "packed": ("--data", room / "data"),
        "folders": ("--input", source / "input", "--target", source / "target"),
        "list": ("--list", tmp_path / "pairs.tsv", "--input", source, "--target", source),
    }
    reports = {}
    for name, words in forms.items():
        result = here("evaluate", room / "model.safetensors", *words, "--actors", 0, "--out", name)
        assert f"report: {name}/index.html\n" in result.stdout and not result.stderr
        reports[name] = report_of(tmp_path / name)
    packed = reports["packed"]
    assert packed["kind"] == "restoration" and packed["data"]["num_samples"] == COUNT
    assert [row["name"] for row in packed["images"]] == [f"photo_{number:03d}" for number in range(COUNT)]
    assert len({row["restored_sha256"] for row in packed["images"]}) == COUNT
    for other in (reports["folders"], reports["list"]):
        assert other["images"] == packed["images"] and other["scores"] == packed["scores"]
        assert other["data"]["targets_digest"] == packed["data"]["targets_digest"]


def test_a_curve_is_single_evaluations_side_by_side(room: Path, tmp_path: Path, here: Here) -> None:
    options = ("--samples", 2, "--lpips", room / "lpips.pt", "--name", "tiny")
    curve = here(*evaluate(room, *options, "--steps", "1,2", out="curve"))
    for steps in (1, 2):
        here(*evaluate(room, *options, "--steps", steps, out=f"single-{steps}"))
        single = (tmp_path / f"single-{steps}" / "report.json").read_bytes()
        assert (tmp_path / "curve" / f"steps-{steps}" / "report.json").read_bytes() == single
    # The model's own number of steps stands for it.
    assert (tmp_path / "curve" / "report.json").read_bytes() == (tmp_path / "single-2" / "report.json").read_bytes()

    written = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert written["samples"] == 2 and written["protocol"]["name"] == "rgb"
    assert [point["steps"] for point in written["points"]] == [1, 2]
    for point in written["points"]:
        report = report_of(tmp_path / "curve" / point["folder"])
        assert point["scores"] == report["scores"] and point["seconds_per_image"] > 0
        assert {"psnr", "ssim", "lpips", "mean2_psnr", "mean2_lpips", "spread", "input_psnr"} <= set(point["scores"])
    table = curve.stdout[curve.stdout.index("quality against cost") :]
    for point in written["points"]:
        assert f"{point['scores']['psnr']['mean']:.3f}" in table
    assert (tmp_path / "curve" / "index.html").stat().st_size > (tmp_path / "single-2" / "index.html").stat().st_size


def test_the_same_command_again_computes_nothing(room: Path, tmp_path: Path, here: Here) -> None:
    command = evaluate(room, out="out")
    here(*command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").rglob("*.parquet")}
    report = (tmp_path / "out" / "report.json").read_bytes()
    again = here(*command)
    assert f"{COUNT} of {COUNT} image(s) were evaluated before" in again.stdout and before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").rglob("*.parquet")} == before
    assert (tmp_path / "out" / "report.json").read_bytes() == report


def test_saved_images_are_those_that_were_scored(room: Path, tmp_path: Path, here: Here) -> None:
    """They are the ones that `rddm restore` writes, and `rddm score` gives them the same digits."""
    source = room / "data-source"
    here(*evaluate(room, "--save-images", "--lpips", room / "lpips.pt", "--name", "ours", out="ours"))
    here("restore", room / "model.safetensors", source / "input", "--out", "restored")
    ours = report_of(tmp_path / "ours")
    saved = sorted((tmp_path / "ours" / "images").iterdir())
    assert [path.stem for path in saved] == [row["key"] for row in ours["images"]]
    for path in saved:
        restored = np.asarray(Image.open(tmp_path / "restored" / path.name)).astype(int)
        assert np.abs(np.asarray(Image.open(path)).astype(int) - restored).max() <= 1  # of another batch

    words = ("score", tmp_path / "ours" / "images", "--lpips", room / "lpips.pt", "--name", "NIMA")
    targets = ("--target", source / "target")
    here(*words, *targets, "--input", source / "input", "--out", "whole")
    here(*words, *targets, "--out", "targets")
    here(*words, "--data", room / "data", "--out", "by-key")
    whole, by_key, targets_alone = (report_of(tmp_path / name) for name in ("whole", "by-key", "targets"))
    assert whole["kind"] == "files" and whole["name"] == "NIMA" and not whole["sampler"]
    for report in (whole, by_key):
        assert report["images"] == ours["images"] and report["scores"] == ours["scores"]
    assert targets_alone["scores"] == {
        name: value for name, value in ours["scores"].items() if not name.startswith("input_") and name != "gain_db"
    }
    assert {report["data"]["targets_digest"] for report in (ours, whole, by_key, targets_alone)} == {
        ours["data"]["targets_digest"]
    }

    table = here("compare", "ours", "whole/report.json", "--out", "table.md")
    text = (tmp_path / "table.md").read_text()
    for name in ("ours", "NIMA"):
        assert name in table.stdout and name in text
    assert text.count(f"{ours['scores']['psnr']['mean']:.3f}") >= 2 and "rgb" in text
    assert f"{ours['scores']['input_psnr']['mean']:.3f}" in text


@pytest.mark.parametrize("protocol", ["y", "rddm-256", "istd", "lol-gtmean", "rgb+border4+float"])
def test_the_command_in_a_report_makes_the_same_report(room: Path, tmp_path: Path, here: Here, protocol: str) -> None:
    here(*evaluate(room, "--protocol", protocol, "--limit", 2, "--metrics", "mae", "--seed", 3, out="first"))
    assert report_of(tmp_path / "first")["protocol"]["name"] == protocol
    here(*command_in(tmp_path / "first")[1:], "--actors", 0, "--out", "second")
    assert (tmp_path / "second" / "report.json").read_bytes() == (tmp_path / "first" / "report.json").read_bytes()


def test_generated_images_are_compared_as_a_set(room: Path, tmp_path: Path, here: Here) -> None:
    """FID and KID of generated images are those that `rddm score` gives the same images saved as files."""
    model = tiny_generator(tmp_path)
    more = ("--protocol", "generation", "--features", room / "features.pt", "--metrics", "fid,kid,is")
    options = ("--num", 5, "--save-images", *more)
    result = here(*evaluate(room, *options, model=model, out="made"))
    made = report_of(tmp_path / "made")
    assert made["kind"] == "generation" and made["scores"] == {} and not made["failed"]
    assert set(made["distribution"]) == {"fid", "kid", "is"} and made["distribution"]["fid"]["value"] > 0
    assert made["distribution"]["fid"]["images"] == 5 and made["distribution"]["fid"]["reference"] == COUNT
    assert made["networks"]["features"]["sha256"] and "FID" in result.stdout
    assert len(list((tmp_path / "made" / "images").iterdir())) == 5
    here("score", tmp_path / "made" / "images", "--data", room / "data", *more, "--out", "files", "--name", "files")
    files = report_of(tmp_path / "files")
    assert files["kind"] == "generation" and files["data"]["targets_digest"] == made["data"]["targets_digest"]
    for name, values in made["distribution"].items():
        assert files["distribution"][name] == pytest.approx(values, rel=1e-6)
    table = here("compare", "made", "files")
    assert "FID" in table.stdout and "files" in table.stdout


def test_a_set_is_no_distance_from_itself(room: Path, tmp_path: Path, here: Here) -> None:
    target = room / "data-source" / "target"
    here("score", target, "--target", target, "--protocol", "generation", "--features", room / "features.pt",
         "--out", "self")  # fmt: skip
    distribution = report_of(tmp_path / "self")["distribution"]
    assert distribution["fid"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(room: Path, tmp_path: Path, here: Here) -> None:
    data = make_dataset(tmp_path, count=12, size=(64, 64))
    options = ("--data", data, "--batch-size", "1", "--steps", "10")
    words = ["evaluate", str(room / "model.safetensors"), *options, "--actors", "0", "--out"]
    process = start([*RDDM, *words, "out"], cwd=tmp_path)
    results = tmp_path / "out" / "results"
    try:
        wait_until(lambda: len(list(results.rglob("*.parquet"))) >= 2 or process.poll() is not None, timeout_s=60)
        process.send_signal(signal.SIGINT)
        stopped = finish(process, timeout_s=30)
    finally:
        kill_group(process)
    assert stopped.code == 75 and "stopped; the same command goes on in out" in stopped.stdout, stopped.text
    assert not stopped.stderr and not (tmp_path / "out" / "report.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    assert 2 <= len(kept) < 12
    again = here(*words, "out")
    assert f"{len(kept)} of 12 image(s) were evaluated before" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    here(*words, "whole")
    assert (tmp_path / "out" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()


def test_results_may_lie_in_a_bucket(room: Path, tmp_path: Path, here: Here, bucket: str) -> None:
    """Results, report and images at s3:// are those on a disk, and the same command computes nothing there."""
    command = evaluate(room, "--save-images", out="local")
    here(*command)
    remote = evaluate(room, "--save-images", out=f"{bucket}/out")
    assert f"report: {bucket}/out/index.html" in here(*remote).stdout
    assert storage.read_bytes(f"{bucket}/out/report.json") == (tmp_path / "local" / "report.json").read_bytes()
    for path in (tmp_path / "local" / "images").iterdir():
        assert storage.read_bytes(f"{bucket}/out/images/{path.name}") == path.read_bytes()
    assert f"{COUNT} of {COUNT} image(s) were evaluated before" in here(*remote).stdout
    assert "local" in here("compare", f"{bucket}/out", "local").stdout


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server() as (endpoint, settings):
        lead_to(settings, monkeypatch)
        yield make_bucket(endpoint, "evaluation")


def test_a_registered_model_is_evaluated_by_its_name(room: Path, tmp_path: Path, here: Here) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    here("register", room / "model.safetensors", "--name", "tiny", "--tracking-uri", store)
    here(*evaluate(room, out="file"))
    model = "models:/tiny@champion"
    here(*evaluate(room, "--tracking-uri", store, model=model, out="registered"))
    registered, file = report_of(tmp_path / "registered"), report_of(tmp_path / "file")
    assert registered["model"]["weights_digest"] == file["model"]["weights_digest"]
    assert registered["images"] == file["images"] and registered["scores"] == file["scores"]


def test_images_that_cannot_be_read_are_listed_and_the_rest_is_scored(room: Path, tmp_path: Path, here: Here) -> None:
    """The pixels of one are damaged behind a sound header; a repaired file is scored by the same command."""
    shutil.copytree(room / "data-source", tmp_path / "source")
    broken = tmp_path / "source" / "input" / "photo_001.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    folders = ("--input", "source/input", "--target", "source/target")
    words = ("evaluate", room / "model.safetensors", *folders, "--actors", 0, "--out", "out")
    result = here(*words, code=3)
    assert result.stderr.count("\n") == 1 and "photo_001.png" in result.stderr
    assert "1 image(s) failed" in result.stdout
    report = report_of(tmp_path / "out")
    assert [(row["name"], row["kind"]) for row in report["failed"]] == [("photo_001", "unreadable")]
    assert len(report["images"]) == COUNT - 1 and report["scores"]["psnr"]["count"] == COUNT - 1
    assert "photo_001" in (tmp_path / "out" / "index.html").read_text()

    method = ("score", "source/input", "--target", "source/target", "--out", "scored")
    assert "photo_001.png" in here(*method, code=3).stderr
    broken.write_bytes(whole)
    here(*words)
    assert len(report_of(tmp_path / "out")["images"]) == COUNT


def test_outputs_that_are_not_finite_are_counted_and_shown(room: Path, tmp_path: Path, here: Here) -> None:
    model = tiny_model(tmp_path, value=float("nan"))
    result = here(*evaluate(room, model=model, out="out"), code=3)
    assert f"{COUNT} image(s) failed" in result.stdout and result.stderr.count("\n") == COUNT
    report = report_of(tmp_path / "out")
    assert [row["kind"] for row in report["failed"]] == ["not finite"] * COUNT and not report["images"]
    assert "not finite" in (tmp_path / "out" / "index.html").read_text()


def test_a_curve_tells_what_failed_at_any_number_of_steps(room: Path, tmp_path: Path, here: Here) -> None:
    broken = tiny_model(tmp_path / "broken", value=math.nan)
    result = here(*evaluate(room, "--steps", "1,2", out="curve", model=broken), code=3)
    assert result.stderr.count("failed: photo_") == 2 * COUNT
    assert [point["failed"] for point in json.loads((tmp_path / "curve" / "curve.json").read_text())["points"]] == [
        COUNT,
        COUNT,
    ]


def test_reference_images_that_cannot_be_read_are_listed(room: Path, tmp_path: Path, here: Here) -> None:
    shutil.copytree(room / "data-source" / "target", tmp_path / "reference")
    path = tmp_path / "reference" / "photo_001.png"
    path.write_bytes(path.read_bytes()[:-40])
    options = ("--protocol", "generation", "--features", room / "features.pt", "--out", "out")
    result = here("score", room / "data-source" / "input", "--target", "reference", *options, code=3)
    assert "failed: " in result.stderr and "photo_001.png" in result.stderr
    report = report_of(tmp_path / "out")
    assert [row["set"] for row in report["failed"]] == ["reference"]
    assert report["distribution"]["fid"]["reference"] == COUNT - 1


def test_reports_of_two_protocols_lie_apart_and_what_is_replaced_is_told(
    room: Path, tmp_path: Path, here: Here
) -> None:
    words = (
        "score",
        room / "data-source" / "input",
        "--target",
        room / "data-source" / "target",
        "--name",
        "../in [x]",
    )
    for protocol in ("rgb", "y"):
        here(*words, "--protocol", protocol)
    assert len(list((tmp_path / "scores").iterdir())) == 2
    here(*words, "--out", "out")
    result = here(*words, "--out", "out", "--protocol", "y")
    assert "was another report (../in [x], protocol rgb" in result.stdout


def test_generated_images_are_compared_with_a_plain_folder(room: Path, tmp_path: Path, here: Here) -> None:
    generator = tiny_generator(tmp_path / "generator")
    target = room / "data-source" / "target"
    options = (
        "--num",
        3,
        "--protocol",
        "generation",
        "--features",
        room / "features.pt",
        "--actors",
        0,
        "--out",
        "out",
    )
    here("evaluate", generator, "--target", target, *options)
    report = report_of(tmp_path / "out")
    assert report["distribution"]["fid"]["images"] == 3 and report["distribution"]["fid"]["reference"] == COUNT
