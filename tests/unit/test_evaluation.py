"""What an evaluation says of a model: samples, precision, rounding, failures, files, features and generation."""

from __future__ import annotations

import math
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import ConfigError, DataError, ModelError
from data_pipeline.rng import stable_id
from data_pipeline.sources import find_clean, find_pairs
from rddm_dist import evaluate, load_model
from rddm_dist.evaluation.distribution import Moments, fid, kid
from rddm_dist.evaluation.evaluate import Plan, plan_features, plan_files, plan_generation, run_plan
from rddm_dist.evaluation.features import load_features, load_lpips
from rddm_dist.evaluation.generate import make_generator
from rddm_dist.evaluation.job import EvalSettings, Job, Unit
from rddm_dist.evaluation.protocol import get_protocol, score
from rddm_dist.evaluation.report import write_report_files
from rddm_dist.evaluation.restore import make_restorer, round_levels
from rddm_dist.evaluation.runner import GENERATED_CASES, run_here
from rddm_dist.evaluation.sources import FileSource, PackedSource
from rddm_dist.evaluation.summary import build_report
from tests.support.datasets import make_dataset, make_folders, random_image
from tests.support.evaluation import (
    CLASSES,
    FEATURES,
    feature_network,
    lpips_network,
    restoration,
    tiny_generator,
    tiny_model,
)

COUNT, SIZE = 5, (16, 24)
GENERATED = (16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in model/, a dataset in data/, its files in data-source/, a feature network."""
    path = tmp_path_factory.mktemp("evaluation")
    tiny_model(path / "model")
    tiny_generator(path / "generator")
    make_dataset(path, count=COUNT, size=SIZE)
    feature_network(path)
    return path


def data(folder: Path) -> PackedSource:
    return PackedSource(str(folder / "data"))


def report_of(plan: Plan, out: Path) -> dict[str, Any]:
    return build_report(plan, run_plan(plan, out=str(out)), name="tiny")


def evaluate_here(folder: Path, out: Path, *, model: str = "model", **settings: Any) -> dict[str, Any]:
    return report_of(restoration(folder / model, data(folder), **settings), out)


def column(report: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in report["images"]]


def levels_of(folder: Path, *, seed: int = 0, **options: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Un-rounded outputs of the model one image at a time, and the targets, in the order of the keys."""
    restorer = make_restorer(load_model(folder / "model"), seed=seed, **options)
    source = data(folder)
    images = [source.read(entry) for entry in source.entries()]
    outputs = []
    for image in images:
        assert image.input is not None
        outputs.append(restorer.restore_levels(image.input[None], [stable_id(image.key)])[0])
    return outputs, [image.target for image in images]


def test_an_evaluation_is_what_one_image_at_a_time_gives(tmp_path: Path, folder: Path) -> None:
    report = evaluate_here(folder, tmp_path, batch_size=1)
    outputs, targets = levels_of(folder)
    pairs = [(round_levels(output), target) for output, target in zip(outputs, targets, strict=True)]
    scores = [score(get_protocol("rgb"), *pair) for pair in pairs]
    for name in ("psnr", "ssim", "mae"):
        assert column(report, name) == [row[name] for row in scores]
        assert report["scores"][name]["mean"] == pytest.approx(np.mean(column(report, name)), rel=1e-12)
    gains = np.subtract(column(report, "psnr"), column(report, "input_psnr"))
    assert report["scores"]["gain_db"]["mean"] == pytest.approx(gains.mean(), rel=1e-12)
    assert report["kind"] == "restoration" and report["failed"] == []


def test_the_api_gives_the_same_report(tmp_path: Path, folder: Path) -> None:
    report = evaluate_here(folder, tmp_path)
    found = evaluate(folder / "model", str(folder / "data"))
    assert len(found["images"]) == COUNT
    for part in ("images", "scores", "protocol", "sampler", "eval", "data"):
        assert found[part] == report[part], part


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_another_batch_size_agrees(tmp_path: Path, folder: Path, batch_size: int) -> None:
    one = evaluate_here(folder, tmp_path / "one", batch_size=1)
    other = evaluate_here(folder, tmp_path / "other", batch_size=batch_size)
    assert column(other, "psnr") == pytest.approx(column(one, "psnr"), abs=0.001)
    assert column(other, "input_psnr") == column(one, "input_psnr")
    assert (one["eval"]["batch_size"], other["eval"]["batch_size"]) == (1, batch_size)


# Several samples


def test_samples_are_those_of_the_following_seeds(tmp_path: Path, folder: Path) -> None:
    report = evaluate_here(folder, tmp_path / "samples", samples=3, seed=5)
    separate = [evaluate_here(folder, tmp_path / f"seed-{seed}", seed=seed) for seed in (5, 6, 7)]
    for name in ("psnr", "ssim", "restored_sha256", "input_psnr"):
        assert column(report, name) == column(separate[0], name), name
    assert column(separate[0], "restored_sha256") != column(separate[1], "restored_sha256")

    runs = [levels_of(folder, seed=seed) for seed in (5, 6, 7)]
    targets = runs[0][1]
    stacks = [np.stack([run[0][number] for run in runs]).astype(np.float64) for number in range(COUNT)]
    protocol = get_protocol("rgb")
    means = [score(protocol, round_levels(s.mean(axis=0)), t)["psnr"] for s, t in zip(stacks, targets, strict=True)]
    spreads = [stack.std(axis=0, ddof=1).mean() for stack in stacks]
    # Batches of four where one image at a time is computed here: single 8-bit values may differ.
    assert column(report, "mean3_psnr") == pytest.approx(means, abs=0.001)
    assert column(report, "spread") == pytest.approx(spreads, rel=1e-4)
    assert min(spreads) > 0.01
    assert report["eval"]["samples"] == 3 and report["scores"]["mean3_psnr"]["count"] == COUNT


def test_the_mean_of_samples_is_of_outputs_that_are_not_rounded(tmp_path: Path, folder: Path) -> None:
    report = evaluate_here(folder, tmp_path, samples=2, batch_size=1)
    runs = [levels_of(folder, seed=seed) for seed in (0, 1)]
    protocol = get_protocol("rgb")
    exact, twice_rounded = [], []
    for first, second, target in zip(runs[0][0], runs[1][0], runs[0][1], strict=True):
        pair = np.stack([first, second]).astype(np.float64)
        exact.append(score(protocol, round_levels(pair.mean(axis=0)), target)["psnr"])
        twice_rounded.append(score(protocol, round_levels(round_levels(pair).mean(axis=0)), target)["psnr"])
    assert column(report, "mean2_psnr") == exact != twice_rounded


def test_without_noise_all_samples_are_one(tmp_path: Path, folder: Path) -> None:
    model = tiny_model(tmp_path / "model", diffusion={"sum_scale": 1e-30})  # drowns in the rounding of every input
    report = report_of(restoration(model, data(folder), samples=3), tmp_path / "out")
    assert column(report, "spread") == [0.0] * COUNT
    assert column(report, "mean3_psnr") == column(report, "psnr")


def test_one_sample_has_neither_mean_nor_spread(tmp_path: Path, folder: Path) -> None:
    names = set(evaluate_here(folder, tmp_path)["scores"])
    assert names == {"psnr", "ssim", "mae", "input_psnr", "input_ssim", "input_mae", "gain_db"}


# Precision and rounding


def test_bf16_is_close_to_fp32_and_recorded(tmp_path: Path, folder: Path) -> None:
    reports = [evaluate_here(folder, tmp_path / name, precision=name) for name in ("fp32", "bf16")]
    assert column(reports[1], "psnr") == pytest.approx(column(reports[0], "psnr"), abs=0.2)
    assert column(reports[1], "restored_sha256") != column(reports[0], "restored_sha256")
    assert [report["eval"]["precision"] for report in reports] == ["fp32", "bf16"]


def test_fp16_needs_a_gpu(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--precision=fp16 needs a GPU; use fp32 or bf16 here"):
        restoration(folder / "model", data(folder), precision="fp16")


def test_a_float_protocol_sees_outputs_that_are_not_rounded(tmp_path: Path, folder: Path) -> None:
    report = evaluate_here(folder, tmp_path, protocol="rgb+float", batch_size=1)
    outputs, targets = levels_of(folder)
    exact = [score(get_protocol("rgb+float"), *pair)["psnr"] for pair in zip(outputs, targets, strict=True)]
    rounded = [score(get_protocol("rgb"), round_levels(x), y)["psnr"] for x, y in zip(outputs, targets, strict=True)]
    assert column(report, "psnr") == exact
    assert all(0 < abs(x - y) < 0.05 for x, y in zip(exact, rounded, strict=True))
    assert report["protocol"]["name"] == "rgb+float" and report["protocol"]["rounding"] == "float"


# Failures


def never(job: Job, units: Sequence[Unit]) -> Iterator[bytes]:
    raise AssertionError("something was computed")


def damage(folder: Path, *, keys: Sequence[str]) -> None:
    """Turn bytes of the inputs of these samples over, inside the shards of a packed dataset."""
    found = 0
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as archive:
            places = {member.name: (member.offset_data, member.size) for member in archive.getmembers()}
        content = bytearray(shard.read_bytes())
        for key in keys:
            if f"{key}.input.png" in places:
                start, size = places[f"{key}.input.png"]
                for place in range(start + size // 4, start + size - 16):
                    content[place] ^= 0xFF
                found += 1
        shard.write_bytes(content)
    assert found == len(keys)


@pytest.mark.parametrize("with_features", [False, True])
def test_weights_that_are_not_numbers_are_counted_image_by_image(
    tmp_path: Path, folder: Path, with_features: bool
) -> None:
    model = tiny_model(tmp_path / "model", value=math.nan)
    features = str(folder / "features.pt") if with_features else ""
    plan = restoration(model, data(folder), samples=2, features=features)
    outcome = run_plan(plan, out=str(tmp_path / "out"))
    report = build_report(plan, outcome, name="nan")
    assert [row["kind"] for row in report["failed"]] == ["not finite"] * COUNT
    assert [row["key"] for row in report["failed"]] == [entry.key for entry in data(folder).entries()]
    assert "the network's output is not finite" in report["failed"][0]["error"]
    assert report["images"] == [] and report["scores"] == {} and report["distribution"] == {}
    write_report_files(tmp_path / "report", report, command="rddm evaluate", cases=outcome.cases)
    assert (tmp_path / "report" / "index.html").stat().st_size > 1000
    again = run_plan(plan, out=str(tmp_path / "out"), execute=never)  # the weights will not get better
    assert again.reused == COUNT


def test_one_image_that_cannot_be_read_is_told_beside_the_good_ones(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    good = evaluate_here(folder, tmp_path / "good", batch_size=1)
    damage(tmp_path / "data", keys=["photo_001"])
    plan = restoration(folder / "model", data(tmp_path), batch_size=1)
    report = report_of(plan, tmp_path / "out")
    (failed,) = report["failed"]
    assert (failed["key"], failed["kind"]) == ("photo_001", "unreadable") and "photo_001" in failed["error"]
    assert report["images"] == [row for row in good["images"] if row["key"] != "photo_001"]
    assert report["scores"]["psnr"]["count"] == COUNT - 1


def test_an_image_that_could_not_be_read_is_tried_again(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    plan = restoration(folder / "model", data(tmp_path), batch_size=2)
    damage(tmp_path / "data", keys=["photo_001"])
    assert len(report_of(plan, tmp_path / "out")["failed"]) == 1
    damage(tmp_path / "data", keys=["photo_001"])  # turned over twice is as before
    asked: list[Unit] = []

    def execute(job: Job, units: Sequence[Unit]) -> Iterator[bytes]:
        asked.extend(units)
        return run_here(job, units)

    report = build_report(plan, run_plan(plan, out=str(tmp_path / "out"), execute=execute), name="tiny")
    assert [[entry.key for entry in unit.entries] for unit in asked] == [["photo_000", "photo_001"]]
    assert report["failed"] == [] and len(report["images"]) == COUNT


def test_images_none_of_which_can_be_read_are_one_error(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    damage(tmp_path / "data", keys=[entry.key for entry in data(folder).entries()])
    with pytest.raises(DataError, match=f"none of the {COUNT} images can be read; the first: ") as caught:
        report_of(restoration(folder / "model", data(tmp_path)), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_model_that_generates_is_not_evaluated_by_restoring_nor_the_other_way(folder: Path) -> None:
    with pytest.raises(ModelError, match="restores none"):
        restoration(folder / "generator", data(folder))
    with pytest.raises(ModelError, match="generates none"):
        settings = EvalSettings(protocol="generation", features=str(folder / "features.pt"))
        plan_generation(load_model(folder / "model"), range(2), settings, size=GENERATED)


def test_a_protocol_without_pairs_does_not_score_what_a_model_restores_nor_the_other_way(folder: Path) -> None:
    features = str(folder / "features.pt")
    with pytest.raises(ConfigError, match="protocol generation compares no pairs of images"):
        restoration(folder / "model", data(folder), protocol="generation", features=features)
    generator = load_model(folder / "generator")
    with pytest.raises(ConfigError, match="protocol rgb compares pairs of images and --num makes images without"):
        plan_generation(generator, range(2), EvalSettings(features=features), size=GENERATED)


# Files that a method wrote


@pytest.mark.parametrize("protocol", ["rgb", "y+border2", "rddm-256"])
def test_outputs_written_and_scored_as_files_have_the_digits_of_the_model(
    tmp_path: Path, folder: Path, protocol: str
) -> None:
    plan = restoration(folder / "model", data(folder), protocol=protocol, keep_images=True)
    report = report_of(plan, tmp_path / "out")
    source = folder / "data-source"
    pairs = find_pairs(source / "input", source / "target")
    for name, given in (("packed", data(folder)), ("folders", FileSource(pairs))):
        scored = report_of(plan_files(given, tmp_path / "out" / "images", plan.job.settings), tmp_path / name)
        assert scored["kind"] == "files" and scored["sampler"] == {}
        for part in ("images", "scores", "protocol"):
            assert scored[part] == report[part], (name, part)
        assert scored["data"]["targets_digest"] == report["data"]["targets_digest"]


def test_outputs_without_inputs_have_no_scores_of_inputs(tmp_path: Path) -> None:
    _, target = make_folders(tmp_path, count=3, size=SIZE)
    report = report_of(plan_files(FileSource(find_clean(target)), target, EvalSettings()), tmp_path / "out")
    assert set(report["scores"]) == {"psnr", "ssim", "mae"}
    assert report["scores"]["psnr"]["infinite"] == 3 and report["scores"]["psnr"]["mean"] is None
    assert report["scores"]["mae"]["mean"] == 0.0


def test_other_outputs_are_other_results(tmp_path: Path) -> None:
    input_dir, target = make_folders(tmp_path, count=3, size=SIZE)
    source = FileSource(find_clean(target))
    exact = run_plan(plan_files(source, target, EvalSettings()), out=str(tmp_path / "out"))
    noisy = run_plan(plan_files(source, input_dir, EvalSettings()), out=str(tmp_path / "out"))
    assert noisy.reused == 0
    assert all(row["mae"] == 0 for row in exact.rows) and all(row["mae"] > 1 for row in noisy.rows)


# Sets of images


def test_set_metrics_are_of_the_restored_images_and_their_targets_in_the_order_of_keys(
    tmp_path: Path, folder: Path
) -> None:
    path = folder / "features.pt"
    plan = restoration(folder / "model", data(folder), features=str(path), metrics=("fid", "kid", "is"), batch_size=2)
    backwards = run_plan(
        plan, out=str(tmp_path / "backwards"), execute=lambda job, units: run_here(job, list(reversed(units)))
    )
    outcome = run_plan(plan, out=str(tmp_path / "out"))
    report = build_report(plan, outcome, name="tiny")
    assert build_report(plan, backwards, name="tiny") == report

    network = load_features(path)
    outputs, targets = levels_of(folder)
    made, real = (
        torch.cat([network(torch.tensor(image).permute(2, 0, 1)[None].float())[0] for image in images])
        for images in ([round_levels(output) for output in outputs], targets)
    )
    assert outcome.vectors["features"].shape == (COUNT, FEATURES)
    assert outcome.vectors["logits"].shape == (COUNT, CLASSES)
    assert np.allclose(outcome.vectors["features"], made, rtol=1e-3)
    assert np.allclose(outcome.vectors["target_features"], real, rtol=1e-5)
    found = report["distribution"]
    assert found["fid"]["value"] == pytest.approx(fid(Moments.of(made), Moments.of(real)), rel=1e-3)
    assert found["kid"]["value"] == pytest.approx(kid(real, made)[0], rel=1e-3)
    assert 1 <= found["is"]["value"] <= CLASSES
    assert found["fid"]["images"] == found["fid"]["reference"] == COUNT
    assert report["networks"]["features"] == network.describe()


def test_features_stand_in_the_order_of_keys_whatever_the_order_of_the_units(tmp_path: Path, folder: Path) -> None:
    _, target = make_folders(tmp_path, count=6, size=SIZE)
    for number, size in ((0, (30, 40)), (3, (12, 12))):
        Image.fromarray(random_image(number, size)).save(target / f"photo_{number:03d}.png")
    source = FileSource(find_clean(target))
    plan = plan_features(source, EvalSettings(features=str(folder / "features.pt"), batch_size=2))
    assert [entry.key for unit in plan.units for entry in unit.entries] != [entry.key for entry in source.entries()]
    network = load_features(folder / "features.pt")
    images = [torch.tensor(source.read(entry).target).permute(2, 0, 1)[None].float() for entry in source.entries()]
    expected = torch.cat([network(image)[0] for image in images])
    found = run_plan(plan, out=str(tmp_path / "out")).vectors["features"]
    assert np.allclose(found, expected, rtol=1e-5)
    assert len(np.unique(found.round(3), axis=0)) == 6  # so that another order would show


def test_lpips_is_that_of_the_network_for_the_rounded_images(tmp_path: Path, folder: Path) -> None:
    path = lpips_network(tmp_path)
    report = evaluate_here(folder, tmp_path / "out", lpips=str(path), batch_size=1)
    network = load_lpips(path)
    outputs, targets = levels_of(folder)
    planes = [
        [torch.tensor(image).permute(2, 0, 1)[None].float() for image in images]
        for images in ([round_levels(output) for output in outputs], targets)
    ]
    expected = [network(x, y).item() for x, y in zip(*planes, strict=True)]
    assert column(report, "lpips") == pytest.approx(expected, rel=1e-4) and min(expected) > 0
    assert report["networks"]["lpips"] == network.describe() and report["protocol"]["metrics"][-1] == "lpips"


def test_a_set_is_at_no_distance_from_itself(tmp_path: Path, folder: Path) -> None:
    features = str(folder / "features.pt")
    _, target = make_folders(tmp_path, count=8, size=SIZE)
    settings = EvalSettings(features=features)
    report = report_of(plan_files(FileSource(find_clean(target)), target, settings), tmp_path / "out")
    assert report["distribution"]["fid"]["value"] == pytest.approx(0, abs=1e-6)


def test_generated_images_are_those_of_the_generator_and_compared_with_a_reference(
    tmp_path: Path, folder: Path
) -> None:
    features = str(folder / "features.pt")
    settings = EvalSettings(protocol="generation", steps=2, seed=3, features=features, batch_size=4)
    model = load_model(folder / "generator")
    plan = plan_generation(model, range(30), settings, size=GENERATED, keep_images=True)
    reference = plan_features(data(folder), settings)
    outcome, real = (run_plan(each, out=str(tmp_path)) for each in (plan, reference))
    report = build_report(plan, outcome, name="tiny", model=model, reference=(reference, real))
    assert report["kind"] == "generation" and report["scores"] == {} and report["protocol"]["metrics"] == []
    assert len(report["images"]) == 30 and report["failed"] == []
    assert [case.key for case in outcome.cases] == [f"{number:08d}" for number in range(GENERATED_CASES)]
    assert all(list(case.sides) == ["restored"] for case in outcome.cases)

    network = load_features(features)
    images = make_generator(model, size=GENERATED, steps=2, seed=3).generate(range(30))
    made = network(torch.from_numpy(images).permute(0, 3, 1, 2).float())[0]
    assert np.allclose(outcome.vectors["features"], made, rtol=1e-3)
    distance = fid(Moments.of(real.vectors["features"]), Moments.of(outcome.vectors["features"]))
    assert report["distribution"]["fid"] == {"value": distance, "images": 30, "reference": COUNT}
    assert len(list((tmp_path / "images").glob("*.png"))) == 30


def test_features_of_a_reference_serve_every_model(tmp_path: Path, folder: Path) -> None:
    settings = EvalSettings(protocol="generation", steps=2, features=str(folder / "features.pt"))
    first = run_plan(plan_features(data(folder), settings), out=str(tmp_path))
    others = (replace(settings, steps=5, seed=9, eta=1.0), replace(settings, protocol="y", precision="bf16"))
    for other in others:
        again = run_plan(plan_features(data(folder), other), out=str(tmp_path), execute=never)
        assert again.reused == COUNT
        assert np.array_equal(again.vectors["features"], first.vectors["features"])
    assert first.cases == []
    changed = replace(settings, features=str(feature_network(tmp_path / "other", seed=1)))
    assert run_plan(plan_features(data(folder), changed), out=str(tmp_path)).reused == 0


def test_pictures_of_images_as_they_are_show_some_of_every_size(tmp_path: Path, folder: Path) -> None:
    _, target = make_folders(tmp_path, count=40, size=(12, 12))
    make_folders(tmp_path / "large", count=10, size=SIZE)
    for path in (tmp_path / "large" / "target").iterdir():
        shutil.move(path, target / f"early_{path.name}")  # first by key and last by size
    settings = EvalSettings(protocol="generation", features=str(folder / "features.pt"), batch_size=16)
    plan = plan_features(FileSource(find_clean(target)), settings, shows_cases=True)
    outcome = run_plan(plan, out=str(tmp_path / "out"))
    assert len(outcome.cases) == 24
    assert any(case.key.startswith("early") for case in outcome.cases)
    assert run_plan(plan, out=str(tmp_path / "out"), execute=never).cases == outcome.cases


def test_a_network_without_classes_has_no_inception_score(tmp_path: Path, folder: Path) -> None:
    network = feature_network(tmp_path, logits=False)
    with pytest.raises(ModelError, match="--metrics=is needs class logits"):
        restoration(folder / "model", data(folder), features=str(network), metrics=("is",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("psnrr",)}, "--metrics=psnrr is not known; choose from psnr, ssim"),
        ({"metrics": ("lpips",)}, "--metrics=lpips needs the file of its network; give --lpips FILE"),
        ({"metrics": ("fid",)}, "--metrics=fid needs a feature network; give --features FILE"),
        ({"metrics": ("psnr",), "protocol": "generation"}, "protocol generation has none; choose fid, kid or is"),
        ({"samples": 0}, "--samples=0 must be from 1 to 1000"),
        ({"protocol": "generation"}, "protocol generation compares sets of images .*; give --features FILE"),
        ({"protocol": "rbg"}, "protocol rbg is not known; choose one of"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalSettings(**settings).check()
