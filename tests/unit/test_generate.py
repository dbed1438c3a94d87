"""Generating images: an image follows from its number, whatever the batch, and a folder holds images of one kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rddm_dist
from data_pipeline.errors import ConfigError, DataError, EnvironmentFault, ModelError
from data_pipeline.rng import Draws
from rddm_dist.config import Config, parse_config
from rddm_dist.diffusion.schedule import make_schedule
from rddm_dist.evaluation.generate import (
    GenerateSettings,
    Generator,
    check_size,
    describe,
    find_written,
    image_path,
    make_generator,
    make_grid,
    plan_batches,
    prepare_folder,
    run_here,
    training_size,
    write_grid,
)
from rddm_dist.evaluation.restore import RestoreSettings, make_restorer
from rddm_dist.factory import make_net
from rddm_dist.loading import Model
from rddm_dist.model.weights import save_safetensors

VALUES: dict[str, Any] = {
    "data": {"crop": 16},
    "model": {"dim": 8, "dim_mults": [1, 2], "num_nets": 1, "condition": "none"},
    "diffusion": {"objective": "pred_res", "num_timesteps": 20, "generate": True},
    "sample": {"steps": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    torch.manual_seed(0)
    save_safetensors(path, make_net(Config.model_validate(VALUES)).state_dict(), config=VALUES)
    return rddm_dist.load_model(path)


class Recorder(nn.Module):
    """A network that keeps the first state it is shown."""

    multiple_of = 8
    seen: ClassVar[list[Tensor]] = []  # of the class: folding copies the network

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x_t: Tensor, times: Any, x_in: Tensor, mask: None, x_self: None) -> tuple[Tensor]:
        assert not x_in.any()
        self.seen.append(x_t)
        return (-x_t,)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_noise_of_an_image_has_the_same_bits_whatever_the_batch(batch_size: int) -> None:
    numbers = range(5, 16)
    generator = Generator(
        Recorder(),  # type: ignore[arg-type]
        make_schedule(num_timesteps=20),
        RestoreSettings(objective="pred_res", steps=1, seed=7, generate=True),
        size=(8, 16),
    )
    Recorder.seen.clear()
    for batch in plan_batches(numbers, batch_size=batch_size, written=set()):
        generator.generate(batch)
    alone = [Draws(7, torch.tensor([number])).noise((1, 3, 8, 16)) for number in numbers]
    assert torch.equal(torch.cat(Recorder.seen), torch.cat(alone))


def test_the_pixels_of_an_image_are_the_same_in_any_batch(model: Model) -> None:
    single = rddm_dist.generate(model, 11, first=3, batch_size=1)
    assert single.shape == (11, 16, 16, 3) and single.dtype == np.uint8
    for batch_size in (3, 8, 16):
        batched = rddm_dist.generate(model, 11, first=3, batch_size=batch_size)
        assert np.abs(batched.astype(int) - single).max() <= 1 and (batched != single).mean() < 1e-3
    assert np.array_equal(rddm_dist.generate(model, 2, first=5, batch_size=1), single[2:4])
    assert not np.array_equal(rddm_dist.generate(model, 1, first=3, seed=1), single[:1])
    assert not np.array_equal(rddm_dist.generate(model, 1, first=3, steps=2), single[:1])
    assert len({image.tobytes() for image in single}) == 11
    assert rddm_dist.generate(model, 0).shape == (0, 16, 16, 3)


def test_batches_are_cut_at_multiples_and_left_out_where_all_is_written() -> None:
    assert plan_batches(range(3, 12), batch_size=4, written=set()) == [range(3, 4), range(4, 8), range(8, 12)]
    assert plan_batches(range(3, 12), batch_size=4, written={3, 4, 5, 7, 8, 9, 10, 11}) == [range(4, 8)]
    assert plan_batches(range(3, 12), batch_size=100, written=set()) == [range(3, 12)]
    assert plan_batches(range(4), batch_size=4, written=set(range(4))) == []


def settings_for(model: Model, **more: Any) -> GenerateSettings:
    return GenerateSettings(**{"size": (16, 16), "steps": 3, "eta": 0.0, **more})


def test_what_an_interrupted_command_writes_later_has_the_same_bytes(model: Model, tmp_path: Path) -> None:
    generator, numbers = make_generator(model, size=(16, 16)), range(2, 9)
    for out in (tmp_path / "whole", tmp_path / "interrupted"):
        prepare_folder(out, describe(model, settings_for(model)))
        list(run_here(generator, plan_batches(numbers, batch_size=3, written=set()), out=out))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert sorted(files) == [f"{number:08d}.png" for number in numbers] + ["samples.json"]

    out = tmp_path / "interrupted"
    for number in (4, 8):
        image_path(out, number).unlink()
    image_path(out, 3).write_bytes(b"kept")
    written = find_written(out, numbers)
    made = list(run_here(generator, plan_batches(numbers, batch_size=3, written=written), out=out))
    assert made == [[4], [8]]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {**files, "00000003.png": b"kept"}


def test_a_folder_keeps_images_of_one_kind(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_folder(out, describe(model, settings_for(model)))
    before = (out / "samples.json").read_bytes()
    written = json.loads(before)
    assert (written["weights_digest"], written["size"], written["sampler"]["seed"]) == (model.digest, [16, 16], 0)
    prepare_folder(out, describe(model, settings_for(model, device="cuda", threads=3)))
    for change, said in (
        ({"seed": 4}, r"sampler.seed: 0 -> 4\)"),
        ({"steps": 2}, r"sampler.steps: 3 -> 2\)"),
        ({"size": (16, 24)}, r"size: \[16, 16\] -> \[16, 24\]\)"),
    ):
        with pytest.raises(DataError, match=rf"holds images of other settings \({said}; give those back"):
            prepare_folder(out, describe(model, settings_for(model, **change)))
    other = rddm_dist.load_model(model.path, overrides=["sample.schedule.alpha_kind=power"])
    with pytest.raises(DataError, match="sampler.schedule.sampling.alpha_kind: same -> power"):
        prepare_folder(out, describe(other, settings_for(model)))
    assert (out / "samples.json").read_bytes() == before

    (out / "samples.json").write_text("{")
    with pytest.raises(DataError, match=r"samples.json cannot be read"):
        prepare_folder(out, describe(model, settings_for(model)))
    (out / "samples.json").unlink()
    image_path(out, 3).touch()
    with pytest.raises(DataError, match=r"holds numbered images and no samples.json"):
        prepare_folder(out, describe(model, settings_for(model)))
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        prepare_folder(tmp_path / "file" / "out", describe(model, settings_for(model)))


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ({"crop": 16}, 16),
        ({"crop": {0: 16, 500: 32, 100: 24}}, 32),
        ({"preprocess": {"resize": 64}}, 64),
        ({"crop": 32, "preprocess": {"resize": 64}}, 32),
    ],
)
def test_images_are_generated_in_the_size_of_training(data: dict[str, Any], size: int) -> None:
    assert training_size(parse_config({**VALUES, "data": data}, source="test")) == (size, size)


def test_a_size_that_does_not_fit_is_one_line(model: Model) -> None:
    with pytest.raises(ConfigError, match="whole images, whose size its configuration does not tell; give --size"):
        training_size(parse_config({**VALUES, "data": {}}, source="test"))
    check_size((65536, 8), 8)
    for size, said in (
        ((20, 16), "images of 20x16 .* multiples of 8, up to 65536; give --size, for example 16 in place of 20"),
        ((16, 21), "for example 24 in place of 21"),
        ((3, 16), "for example 8 in place of 3"),
        ((0, 16), "for example 8 in place of 0"),
        ((16, 65544), "for example 65536 in place of 65544"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_size(size, 8)
    with pytest.raises(ConfigError, match="multiples of 2"):
        rddm_dist.generate(model, 1, size=(16, 15))
    assert rddm_dist.generate(model, 1, size=(10, 14)).shape == (1, 10, 14, 3)


def test_models_generate_or_restore(model: Model) -> None:
    with pytest.raises(ModelError, match="generates images from noise alone .* use rddm sample"):
        make_restorer(model)
    values = {**VALUES, "data": {}, "diffusion": {**VALUES["diffusion"], "generate": False}}
    config = parse_config(values, source="test")
    restoring = Model(make_net(config), make_schedule(num_timesteps=20), config, "", Path(), {})
    with pytest.raises(ModelError, match="generates none; use rddm restore, or a model trained with"):
        make_generator(restoring)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (9, 3, 3), (10, 4, 3)])
def test_a_grid_is_nearly_square_and_shows_every_image_in_order(count: int, columns: int, rows: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (count, 4, 6, 3), dtype=np.uint8)
    grid = np.asarray(make_grid(images))
    assert grid.shape == (4 * rows, 6 * columns, 3)
    for i in range(rows * columns):
        row, column = divmod(i, columns)
        cell = grid[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        assert np.array_equal(cell, images[i]) if i < count else (cell == 255).all()


def test_a_grid_of_a_damaged_image_is_one_line(model: Model, tmp_path: Path) -> None:
    generator = make_generator(model, size=(16, 16))
    list(run_here(generator, [range(2)], out=tmp_path))
    write_grid(tmp_path, range(2), size=(16, 16))
    image_path(tmp_path, 1).write_bytes(image_path(tmp_path, 1).read_bytes()[:60])
    with pytest.raises(DataError, match=r"00000001.png: .*; delete it and run the same command again"):
        write_grid(tmp_path, range(2), size=(16, 16))
