"""Sampling through the command line: generated images, masks given by users, other sampler settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.ray_session import ray_session
from data_pipeline.rng import stable_id
from rddm_dist.config import Config
from rddm_dist.evaluation.restore import load_restorer
from rddm_dist.factory import make_net
from rddm_dist.model.weights import save_safetensors
from tests.e2e.conftest import Here, TinyRun
from tests.support.datasets import make_dataset, make_folders
from tests.support.processes import run_workers
from tests.support.runs import TRAIN, write_config


@pytest.fixture
def refused(here: Here) -> Callable[..., str]:
    """Run the command line in this process; it must end with exit code 2 and one line.   -> the line"""

    def call(*arguments: object) -> str:
        result = here(*arguments)
        lines = result.stderr.splitlines()
        assert result.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.text
        return lines[0]

    return call


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that learns to generate, with a preview of five images."""
    folder = tmp_path_factory.mktemp("generating")
    config = write_config(folder, make_dataset(folder, count=6))
    options = ("train.steps=2", "sample.every=2", "sample.images=5", "sample.size=12", "diffusion.generate=true")
    [result] = run_workers([*TRAIN, str(config), *options, "model.condition=none"], 1, cwd=folder)
    assert result.code == 0, result.text
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """One Ray for the commands that are run in this process: starting it takes longer than what they do."""
    with ray_session(cpus=2):
        yield


def make_model(path: Path, **model: object) -> Path:
    """A small model file with drawn weights."""
    values = {
        "model": {"dim": 8, "dim_mults": [1, 2], "num_nets": 1, **model},
        "diffusion": {"objective": "pred_res", "num_timesteps": 20},
        "sample": {"steps": 2},
    }
    torch.manual_seed(0)
    save_safetensors(path, make_net(Config.model_validate(values)).state_dict(), config=values)
    return path


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Name -> (H, W, 3) int, of the numbered images in a folder."""
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("0*.png")}


def test_previews_of_a_generating_run_are_a_grid_without_scores(generating: Path) -> None:
    # Five images of the size of the crop, cut to 12 pixels in their centre.
    assert Image.open(generating / "samples" / "step-00000002.png").size == (36, 24)
    records = [json.loads(line) for line in (generating / "metrics.jsonl").read_text().splitlines()]
    assert not [record for record in records if any("preview" in name for name in record.get("metrics", {}))]


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("two_cpus")
def test_who_generates_an_image_does_not_show(generating: Path, tmp_path: Path, here: Here) -> None:
    for actors, batch_size in ((0, 3), (1, 8), (2, 1)):
        result = here(
            *("sample", generating, "--num", 9, "--first", 4, "--out", f"out{actors}"),
            *("--actors", actors, "--batch-size", batch_size),
        )
        assert result.code == 0 and "sample 9/9" in result.stdout, result.text
        assert f"9 image(s) of 16x16 in out{actors}\n" in result.stdout and not result.stderr
    expected = pixels(tmp_path / "out0")
    assert sorted(expected) == [f"{number:08d}.png" for number in range(4, 13)]
    for folder in (tmp_path / "out1", tmp_path / "out2"):
        assert sorted(path.name for path in folder.iterdir()) == [*sorted(expected), "samples.json"]
        assert (folder / "samples.json").read_bytes() == (tmp_path / "out0" / "samples.json").read_bytes()
        found = pixels(folder)
        assert max(np.abs(found[name] - expected[name]).max() for name in expected) <= 1


def test_the_same_command_goes_on_and_more_images_may_follow(generating: Path, tmp_path: Path, here: Here) -> None:
    arguments = ("sample", generating, "--out", "out", "--grid", "--batch-size", 4, "--num")
    assert here(*arguments, 6).code == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    assert Image.open(tmp_path / "out" / "grid.png").size == (3 * 16, 2 * 16)
    (tmp_path / "out" / "00000002.png").unlink()
    result = here(*arguments, 8)
    assert result.code == 0 and "8 image(s) of 16x16 in out, 5 were there" in result.stdout, result.text
    assert Image.open(tmp_path / "out" / "grid.png").size == (3 * 16, 3 * 16)
    for number in range(6):
        path = tmp_path / "out" / f"{number:08d}.png"
        assert path.read_bytes() == before[path.name][0]
        assert (path.stat().st_mtime_ns == before[path.name][1]) == (number != 2)
    assert len(pixels(tmp_path / "out")) == 8


def test_sampling_with_a_wrong_setting(generating: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    base = ("sample", generating, "--num", 1, "--out", "out")
    for arguments, said in (
        (["--size", "15"], "multiples of 2, up to 65536; give --size, for example 16 in place of 15"),
        (["--size", "16x"], "--size=16x must be HEIGHTxWIDTH or one side"),
        (["--steps", "21"], "must lie in 1..20"),
        (["--eta", "0.5", "--set", "sample.path=residual_first"], "sample.eta=0.5 does not fit"),
        (["--steps", "2", "--set", "sample.steps=3"], "--steps and --set sample.steps say the same"),
        (["--first", "100000000"], "image 100000000 of --first 100000000 --num 1 passes 99999999"),
        (["--actors", "1:2"], "a range of workers is not supported yet"),
    ):
        assert said in refused(*base, *arguments)
    model = make_model(tmp_path / "model.safetensors")
    assert "restores degraded images and generates none" in refused("sample", model, "--num", 1, "--out", "out")
    assert not (tmp_path / "out").exists()


def test_a_generating_model_restores_nothing(
    generating: Path, tiny_run: TinyRun, tmp_path: Path, refused: Callable[..., str]
) -> None:
    source, _ = make_folders(tmp_path, count=1)
    said = "generates images from noise alone (diffusion.generate=true) and restores none; use rddm sample"
    assert said in refused("restore", generating, source, "--out", "out")
    assert said in refused("evaluate", generating, "--data", tiny_run.data, "--actors", 1, "--out", "out")
    assert not (tmp_path / "out").exists()


def test_masks_are_found_by_name(tmp_path: Path, here: Here) -> None:
    model = make_model(tmp_path / "model.safetensors", condition="input_mask")
    source, _ = make_folders(tmp_path, count=3, size=(18, 22), mask=True)
    (source / "deep").mkdir()
    (tmp_path / "mask" / "deep").mkdir()
    (source / "photo_002.png").rename(source / "deep" / "photo.png")
    mask = Image.open(tmp_path / "mask" / "photo_002.png")
    mask.save(tmp_path / "mask" / "deep" / "photo.bmp")  # another type
    (tmp_path / "mask" / "photo_002.png").unlink()
    Image.new("L", (5, 5)).save(tmp_path / "mask" / "photo_001.png")  # another size
    result = here("restore", model, source, "--mask", "mask", "--out", "out")
    assert result.code == 3 and "restored 2 of 3" in result.stdout, result.text
    assert "photo_001.png: its mask mask/photo_001.png is 5x5, the image 22x18" in result.stderr

    image = np.asarray(Image.open(source / "deep" / "photo.png"))[None]
    expected = load_restorer(model).restore(image, [stable_id("photo")], np.asarray(mask)[None])[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "deep" / "photo.png")), expected)
    single = ("restore", model, source / "deep" / "photo.png", "--mask", "mask/deep/photo.bmp", "--out", "single")
    assert here(*single).code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "single" / "photo.png")), expected)


def test_masks_that_do_not_fit(tmp_path: Path, refused: Callable[..., str]) -> None:
    masked = make_model(tmp_path / "masked.safetensors", condition="input_mask")
    plain = make_model(tmp_path / "plain.safetensors")
    source, _ = make_folders(tmp_path, count=2, mask=True)
    first = tmp_path / "mask" / "photo_000.png"
    base = ("--out", "out", source)
    assert "needs a mask for every image" in refused("restore", masked, *base)
    assert "a mask was given, but this network has" in refused("restore", plain, *base, "--mask", "mask")
    assert "is one image for 2" in refused("restore", masked, *base, "--mask", first)
    assert "--mask no does not exist" in refused("restore", masked, *base, "--mask", "no")
    Image.open(first).save(first.with_suffix(".bmp"))
    assert "has 2 masks, " in refused("restore", masked, *base, "--mask", "mask")
    for path in (first, first.with_suffix(".bmp")):
        path.unlink()
    line = refused("restore", masked, *base, "--mask", "mask")
    assert "photo_000.png has no mask in mask; give it one named photo_000.png" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("two_cpus")
def test_other_sampler_settings_reach_the_actors_and_the_report(tiny_run: TinyRun, tmp_path: Path, here: Here) -> None:
    base = ("evaluate", tiny_run.run_dir, "--data", tiny_run.data, "--limit", 2)
    other = ("--set", "sample.schedule.alpha_kind=power", "--set", "sample.schedule.alpha_power=3")
    for actors, settings, out in ((0, (), "plain"), (0, other, "here"), (1, other, "actor")):
        result = here(*base, *settings, "--actors", actors, "--out", out)
        assert result.code == 0, result.text
    texts = {name: (tmp_path / name / "report.json").read_bytes() for name in ("plain", "here", "actor")}
    assert texts["here"] == texts["actor"]
    plain, changed = (json.loads(texts[name]) for name in ("plain", "here"))
    assert changed["sampler"]["schedule"]["sampling"]["alpha_power"] == 3
    assert changed["eval"]["overrides"] == list(other[1::2])
    assert changed["sampler"] != plain["sampler"] and changed["scores"] != plain["scores"]
    assert changed["model"] == plain["model"]


def test_other_sampler_settings_that_do_not_fit(tiny_run: TinyRun, tmp_path: Path, refused: Callable[..., str]) -> None:
    source, _ = make_folders(tmp_path, count=1)
    restore = ("restore", tiny_run.run_dir, source, "--out", "out")
    evaluate = ("evaluate", tiny_run.run_dir, "--data", tiny_run.data, "--actors", 0, "--out", "out")
    for command in (restore, evaluate):
        assert "did you mean sample.steps?" in refused(*command, "--set", "sample.stepz=3")
        assert "is no setting of the sampler" in refused(*command, "--set", "train.steps=3")
        wrong = ("--set", "sample.schedule.alpha_kind=linear", "--set", "sample.schedule.alpha=normal")
        assert "sample.schedule.alpha=normal" in refused(*command, *wrong)
        assert "sample.use=noise does not fit" in refused(*command, "--set", "sample.use=noise")
    assert not (tmp_path / "out").exists()
