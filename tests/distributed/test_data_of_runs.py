"""What a run does with its data: bad samples are bounded, crops grow, inputs are made, datasets mix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.pack import pack
from data_pipeline.reader import Dataset
from data_pipeline.sources import find_clean
from rddm_dist.model.weights import load_safetensors
from tests.support.datasets import make_dataset, make_folders
from tests.support.processes import Finished, run_workers
from tests.support.runs import TRAIN, write_config


def damage(uri: str, keys: set[str]) -> None:
    """Overwrite the input images of samples inside their shards."""
    dataset = Dataset(uri)
    for place, entry in dataset.entries():
        if entry.key in keys:
            with open(Path(uri) / dataset.manifest.shards[place.shard_index].name, "r+b") as shard:
                shard.seek(entry.members[0].start)
                shard.write(bytes(40))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 pairs of which 2 cannot be read."""
    uri = make_dataset(tmp_path_factory.mktemp("damaged"), count=20)
    damage(uri, {"photo_003", "photo_011"})
    return uri


def start(folder: Path, data: str, world_size: int, *overrides: str) -> list[Finished]:
    folder.mkdir(exist_ok=True)
    return run_workers([*TRAIN, str(write_config(folder, data)), *overrides], world_size, cwd=folder, timeout_s=120)


def done(results: list[Finished]) -> None:
    assert {result.code for result in results} == {0}, "\n".join(result.text for result in results)


def quarantine(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "runs" / "tiny" / "quarantine.jsonl").read_text().splitlines()]


def bad_counts(folder: Path) -> list[int]:
    records = [json.loads(line) for line in (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    metrics = [record["metrics"] for record in records if record["event"] == "metrics"]
    return [values["data/bad_samples"] for values in metrics if "data/bad_samples" in values]


def test_bad_samples_are_written_down_once_whatever_the_workers_and_restarts(damaged: str, tmp_path: Path) -> None:
    allowed = "data.bad_sample_budget=0.1"
    done(start(tmp_path / "two", damaged, 2, allowed))
    rows = quarantine(tmp_path / "two")
    assert {row["key"] for row in rows} == {"photo_003", "photo_011"} and len(rows) == 2
    assert all("are not those packed" in str(row["reason"]) and row["data"] == damaged for row in rows)
    assert bad_counts(tmp_path / "two")[-1] == 2

    done(start(tmp_path / "one", damaged, 1, allowed, "train.steps=5"))
    done(start(tmp_path / "one", damaged, 1, allowed))
    assert quarantine(tmp_path / "one") == rows
    assert bad_counts(tmp_path / "one") == bad_counts(tmp_path / "two")


def test_over_budget_the_run_stops_on_all_workers_and_lists_them(damaged: str, tmp_path: Path) -> None:
    results = start(tmp_path, damaged, 2, "data.bad_sample_budget=0.05")
    assert {result.code for result in results} == {2}, results[0].text
    text = "".join(result.stderr for result in results)
    assert text.count("error: ") == 1 and "Traceback" not in text
    assert "2 of 20 samples cannot be read, more than data.bad_sample_budget=0.05 allows" in text
    assert "photo_003.input.png" in text and "photo_011.input.png" in text and "quarantine.jsonl" in text
    # A run that goes on knows what it has met.
    again = start(tmp_path, damaged, 1, "data.bad_sample_budget=0.05")
    assert again[0].code == 2 and "2 of 20 samples" in again[0].stderr
    done(start(tmp_path, damaged, 1, "data.bad_sample_budget=0.1"))


@pytest.mark.slow
def test_bad_samples_are_known_by_their_data_and_forgotten_when_mended(damaged: str, tmp_path: Path) -> None:
    """The dataset moves, the run goes on and counts nothing twice; over budget it stops, mended it goes on."""
    done(start(tmp_path, damaged, 1, "data.bad_sample_budget=0.1", "train.steps=6"))
    moved, mended = tmp_path / "moved", make_dataset(tmp_path, count=20, name="mended")
    shutil.copytree(damaged, moved)
    done(start(tmp_path, str(moved), 1, "data.bad_sample_budget=0.1", "train.steps=8"))
    assert len(quarantine(tmp_path)) == 2 and bad_counts(tmp_path)[-1] == 2
    refused = start(tmp_path, str(moved), 2, "data.bad_sample_budget=0.05")
    assert {result.code for result in refused} == {2}
    done(start(tmp_path, mended, 2, "data.bad_sample_budget=0.05"))
    assert quarantine(tmp_path) == [] and bad_counts(tmp_path)[-1] == 0


def test_previews_pass_over_what_cannot_be_read_and_show_what_training_sees(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, count=8)
    damage(data, {"photo_000"})
    options = ["sample.every=5", "data.bad_sample_budget=0.5", "data.degrade=noise(sigma=100)"]
    done(start(tmp_path, data, 2, *options))
    records = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    psnr = [r["metrics"]["preview/input_psnr"] for r in records if "preview/input_psnr" in r.get("metrics", {})]
    assert len(psnr) == 2 and psnr[0] == psnr[1] and 7 < psnr[0] < 13  # sigma 100, clipped; what is stored has 28 dB


@pytest.mark.slow
def test_a_run_on_clean_images_makes_its_inputs_and_resumes_exactly(tmp_path: Path) -> None:
    pack(find_clean(make_folders(tmp_path, count=12)[1]), str(tmp_path / "clean"), jobs=1, shard_mb=0.02)
    options = [
        "data.degrade=blur(sigma=0.5..1)+noise(sigma=5..50)",
        "data.crop={0: 16, 4: 24}",
        "data.rotate=true",
        "sample.every=5",
    ]
    states = []
    for name, stops in (("whole", ()), ("parts", ("train.steps=3",))):
        for stop in stops:
            done(start(tmp_path / name, str(tmp_path / "clean"), 2, *options, stop))
        done(start(tmp_path / name, str(tmp_path / "clean"), 2, *options))
        states.append(load_safetensors(tmp_path / name / "runs" / "tiny" / "model.safetensors")[0])
        assert (tmp_path / name / "runs" / "tiny" / "samples" / "step-00000010.png").is_file()
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
    refused = start(tmp_path / "plain", str(tmp_path / "clean"), 1)
    assert refused[0].code == 2 and "holds clean images only; set data.degrade" in refused[0].stderr


def test_a_mixture_trains_and_is_known_by_all_of_its_datasets(tmp_path: Path) -> None:
    uris = [make_dataset(tmp_path, count=count, seed=count, name=f"set{count}") for count in (6, 12)]
    given = f"data.uri=[{uris[0]}, {uris[1]}]"
    done(start(tmp_path / "run", uris[0], 2, given, "data.weights=[1, 2]", "train.steps=6"))
    moved = tmp_path / "moved"
    shutil.copytree(uris[1], moved)
    done(start(tmp_path / "run", uris[0], 1, f"data.uri=[{uris[0]}, {moved}]", "data.weights=[1, 2]"))
    other = start(tmp_path / "run", uris[0], 1, f"data.uri=[{moved}, {uris[0]}]", "data.weights=[1, 2]")
    assert other[0].code == 2 and "was started on other data" in other[0].stderr
    wrong = start(tmp_path / "run", uris[0], 1, given, "data.weights=[2, 1]")
    assert wrong[0].code == 2 and "data.weights" in wrong[0].stderr
