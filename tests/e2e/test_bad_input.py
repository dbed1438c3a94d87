"""What a user can get wrong: one clear line on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rddm_dist.training.ownership import OWNER_PATTERN
from tests.e2e.conftest import Here, TinyRun
from tests.support.datasets import make_dataset, make_folders
from tests.support.evaluation import feature_network, lpips_network, tiny_generator, tiny_model
from tests.support.ownership_probe import Child
from tests.support.processes import rddm

Refused = Callable[..., str]


@pytest.fixture
def refused(here: Here) -> Refused:
    """Run the command line in this process; it must end with exit code 2 and one line.   -> the line"""

    def call(*arguments: object) -> str:
        result = here(*arguments)
        assert result.code == 2 and "Traceback" not in result.text, result.text
        lines = [line for line in result.stderr.splitlines() if line and not line.startswith("warning: SKIPPING")]
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        return lines[0]

    return call


def pack_arguments(folder: Path, *more: object) -> list[object]:
    return ["pack", "--input", folder / "input", "--target", folder / "target", "--out", folder / "out", *more]


def test_pack_without_its_folder(refused: Refused, tmp_path: Path) -> None:
    assert "input" in refused(*pack_arguments(tmp_path))
    assert not (tmp_path / "out").exists()


def test_pack_of_an_empty_folder(refused: Refused, tmp_path: Path) -> None:
    for name in ("input", "target"):
        (tmp_path / name).mkdir()
    assert "image" in refused(*pack_arguments(tmp_path))
    assert not (tmp_path / "out").exists()


def test_pack_with_an_orphan(refused: Refused, tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "target" / "photo_003.png").unlink()
    assert "photo_003" in refused(*pack_arguments(tmp_path))
    assert not (tmp_path / "out").exists()


def test_pack_of_a_pair_of_different_sizes(refused: Refused, tmp_path: Path) -> None:
    make_folders(tmp_path)
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "target" / "photo_002.png")
    line = refused(*pack_arguments(tmp_path))
    assert "photo_002" in line and "9x8" in line
    assert not (tmp_path / "out").exists()


def test_pack_of_an_unreadable_image(refused: Refused, tmp_path: Path) -> None:
    make_folders(tmp_path)
    broken = tmp_path / "input" / "photo_004.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert "photo_004.png" in refused(*pack_arguments(tmp_path))
    assert not (tmp_path / "out").exists()


def test_pack_with_an_unknown_codec(refused: Refused, tmp_path: Path) -> None:
    make_folders(tmp_path)
    line = refused(*pack_arguments(tmp_path, "--codec", "tiff"))
    assert "tiff" in line and "webp" in line
    assert not (tmp_path / "out").exists()


def test_pack_with_no_source(refused: Refused, tmp_path: Path) -> None:
    assert "--list" in refused("pack", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "did you mean train.steps?"),
        ("train.global_batch=0", "train.global_batch=0"),
        ("engine.zero_stage=4", "engine.zero_stage=4"),
        ("data.crop=64", "holds images of 48x40 to 48x40; set data.crop to 0 or 1..40"),
        ("data.crop=15", "data.crop=15 must be a multiple of 2"),
        ("data.uri=/nowhere", "/nowhere is no packed dataset"),
        ("data.degrade=nose(sigma=3)", "did you mean noise?"),
        ("data.cache_gb=.inf", "data.cache_gb=inf"),
        ("data.cache_gb=1e-6", "data.cache_gb=1e-06 holds no shard"),
        ("data.weights=[.inf]", "data.weights"),
        ("model.condition=input_mask", "needs masks"),
        ("engine.precision=fp16", "engine.precision=fp16 needs a GPU"),
        ("run.storage=ftp2://host/runs", "ftp2://host/runs"),
        ("ema.lengths=[0.05, 0.4]", "ema.lengths"),
        ("ema.lengths=[0.05, 0.05]", "names a length twice"),
        ("ema.snapshot_every=5", "ema.snapshot_every=5 has nothing to keep; set ema.lengths"),
        ("train.keep_last=1", "train.keep_last=1"),
        ("train.keep_best=2", "train.keep_best=2 goes by preview/psnr, which this run does not measure"),
        ("engine.deepspeed={optimizer: {type: Adam}}", "engine.deepspeed.optimizer is derived"),
        ("engine.deepspeed={zero_optimization: 3}", "engine.deepspeed.zero_optimization must be a mapping"),
        ("optim.betas=[0.9, 1.5]", "optim.betas"),
        ("model.dim_mults=[0, 1]", "model.dim_mults"),
        ("diffusion.objective=pred_noise", "diffusion.objective=pred_noise cannot recover the image"),
    ],
)
def test_train_with_a_wrong_setting(
    refused: Refused, tiny_run: TinyRun, tmp_path: Path, override: str, said: str
) -> None:
    line = refused("train", tiny_run.config, f"run.storage={tmp_path / 'runs'}", override)
    assert said in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("diffusion.schedule.kind=quadratic", "diffusion.schedule.kind='quadratic'"),
        ("diffusion.schedule.alpha=sideways", "diffusion.schedule.alpha='sideways'"),
        (
            "diffusion.schedule.alpha=normal",
            "diffusion.schedule.alpha=normal is not known with diffusion.schedule.kind",
        ),
        ("diffusion.schedule.kind=power diffusion.schedule.alpha_power=-1", "diffusion.schedule.alpha_power=-1"),
        ("diffusion.schedule.beta2_power=2", "has no effect with diffusion.schedule.kind=linear; use kind=power"),
        ("diffusion.sum_scale=0", "diffusion.sum_scale=0"),
        ("diffusion.sum_scale=-1", "diffusion.sum_scale=-1"),
        ("diffusion.objective=pred_everything", "diffusion.objective='pred_everything'"),
        (
            "diffusion.objective=pred_v",
            "diffusion.objective=pred_v does not fit diffusion.process=rddm; set it to ddpm",
        ),
        ("diffusion.process=ddpm", "diffusion.process=ddpm"),
        ("diffusion.objective=auto", "diffusion.objective=auto cannot read the output as noise"),
        ("diffusion.objective=auto model.num_nets=2", "model.num_nets=2 does not fit diffusion.objective=auto"),
        ("diffusion.objective=auto diffusion.schedule.kind=ddim train.init_from=x", "train.init_from="),
        ("diffusion.objective=auto diffusion.schedule.kind=ddim optim.weight_decay=0.1", "optim.weight_decay=0.1"),
        ("diffusion.generate=true", "set model.condition=none"),
        ("diffusion.generate=true model.condition=none data.degrade=noise", "data.degrade is about degraded images"),
        ("sample.steps=21", "sample.steps=21 exceeds diffusion.num_timesteps=20"),
        ("sample.eta=1.5", "sample.eta=1.5"),
        ("sample.eta=-0.1", "sample.eta=-0.1"),
        ("sample.update=euler", "sample.update='euler'"),
        ("sample.path=backwards", "sample.path"),
        ("sample.path=[[1,1],[0.5,0.2],[0.6,0.1],[0,0]]", "sample.path rises from (0.5, 0.2) to (0.6, 0.1)"),
        ("sample.path=[[0.9,1],[0,0]]", "sample.path starts at (0.9, 1)"),
        ("sample.path=residual_first sample.eta=0.5", "sample.eta=0.5 does not fit sample.path=residual_first"),
        ("sample.use=noise", "sample.use=noise does not fit diffusion.objective=pred_res"),
        ("sample.schedule.alpha_kind=linear sample.schedule.alpha=normal", "sample.schedule.alpha=normal is not known"),
        ("model.kind=shared_encoder", "model.kind=shared_encoder has two outputs"),
        ("optim.noise_lr=1e-3", "optim.noise_lr=0.001 is for the second of two networks"),
        ("train.init_from=nowhere", "train.init_from"),
    ],
)
def test_train_with_a_method_that_cannot_be(
    refused: Refused, tiny_run: TinyRun, tmp_path: Path, overrides: str, said: str
) -> None:
    line = refused("train", tiny_run.config, f"run.storage={tmp_path / 'runs'}", "--dry-run", *overrides.split())
    assert said in line
    assert not (tmp_path / "runs").exists()


def test_train_with_more_workers_than_rows(refused: Refused, tiny_run: TinyRun) -> None:
    assert "7 workers exceed train.global_batch=6" in refused("train", tiny_run.config, "--workers", 7)
    assert "a range of workers is not supported yet" in refused("train", tiny_run.config, "--workers", "1:4")
    assert "--workers=x" in refused("train", tiny_run.config, "--workers", "x")


def test_continuing_with_another_identity(refused: Refused, tiny_run: TinyRun, tmp_path: Path) -> None:
    before = (tiny_run.run_dir / "config.yaml").read_bytes()
    line = refused("train", tiny_run.config, "optim.lr=5e-4", "train.steps=20")
    assert "optim.lr: 0.0001 -> 0.0005" in line and "run.name" in line and "train.steps" not in line
    other = make_dataset(tmp_path, count=5, size=(40, 48), seed=9)
    assert "was started on other data" in refused("train", tiny_run.config, f"data.uri={other}")
    assert (tiny_run.run_dir / "config.yaml").read_bytes() == before


def test_a_run_folder_in_use(refused: Refused, tiny_run: TinyRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run.run_dir, run_dir)
    (run_dir / "model.safetensors").unlink()
    before = sorted(path.name for path in run_dir.iterdir())
    with Child(run_dir) as other:
        assert other.ask("take") == "taken"
        line = refused("train", tiny_run.config, f"run.storage={tmp_path / 'runs'}")
        assert f"run folder {run_dir} is in use by pid {other.pid}" in line and "another run.name" in line
    assert sorted(path.name for path in run_dir.iterdir() if not OWNER_PATTERN.fullmatch(path.name)) == before


def test_a_checkpoint_of_a_newer_version(refused: Refused, tiny_run: TinyRun, tmp_path: Path) -> None:
    """It is not passed over in favour of an older one, as a damaged one is."""
    run_dir = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run.run_dir, run_dir)
    commit = run_dir / "checkpoints" / "step-00000010" / "COMMIT.json"
    body = json.loads(commit.read_text())
    commit.write_text(json.dumps({**body, "format_version": body["format_version"] + 1}))
    line = refused("train", tiny_run.config, f"run.storage={tmp_path / 'runs'}")
    assert "has checkpoint format 3, this version of rddm-dist reads up to 2; upgrade it" in line
    assert "has checkpoint format 3" in refused("evaluate", run_dir, "--data", tiny_run.data)


def test_mlflows_default_store_cannot_be_at_a_url(refused: Refused, tiny_run: TinyRun) -> None:
    line = refused("train", tiny_run.config, "run.storage=s3://bucket/runs", "tracking.backend=mlflow")
    assert "run.storage=s3://bucket/runs" in line and "set tracking.uri" in line


def test_names_are_taken_as_they_are(tiny_run: TinyRun, tmp_path: Path) -> None:
    """A run called 2024, a folder with a blank and a hash: YAML has no say in them."""
    storage = tmp_path / "my #1"
    result = rddm("train", str(tiny_run.config), "--run", "2024", "--storage", str(storage), "--dry-run", cwd=tmp_path)
    assert result.code == 0, result.text
    assert f"# run folder: {storage / '2024'} (new)" in result.stdout


def test_storage_that_cannot_be_written(refused: Refused, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    line = refused("train", tiny_run.config, "--storage", tmp_path / "file")
    assert "run.storage" in line and "cannot be written" in line


def test_a_folder_that_is_no_run(refused: Refused, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "thesis.tex").write_text("precious")
    assert "is not a run" in refused("train", tiny_run.config, f"run.storage={tmp_path / 'runs'}")
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["thesis.tex"]


def test_no_compiler(refused: Refused, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = refused("train", tiny_run.config, f"run.storage={tmp_path / 'runs'}")
    assert "no C++ compiler" in line and "apt-get install g++" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("runs/absent", "does not exist"),
        ("models:/nothing@champion", "there is no registry at"),
        ("models:/nothing", "must look like"),
    ],
)
def test_a_model_that_does_not_exist(
    refused: Refused, tiny_run: TinyRun, tmp_path: Path, model: str, said: str
) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    line = refused("evaluate", model, "--data", tiny_run.data, "--out", tmp_path / "report", "--tracking-uri", store)
    assert said in line
    assert not (tmp_path / "report").exists()


def test_a_truncated_checkpoint(refused: Refused, tiny_run: TinyRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run.run_dir, run_dir)
    for file in run_dir.glob("checkpoints/*/rank-00000.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    newest = max(run_dir.glob("checkpoints/*"))
    for model in (newest, run_dir):
        line = refused("evaluate", model, "--data", tiny_run.data, "--out", tmp_path / "report")
        assert "has 1000 bytes instead of" in line
    (run_dir / "model.safetensors").write_bytes((run_dir / "model.safetensors").read_bytes()[:500])
    line = refused("restore", run_dir / "model.safetensors", tmp_path, "--out", tmp_path / "out")
    assert "no images" in line
    make_folders(tmp_path)
    line = refused("restore", run_dir / "model.safetensors", tmp_path / "input", "--out", tmp_path / "out")
    assert "cut short" in line
    assert not (tmp_path / "report").exists() and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, feature networks, data packed and in folders: all that evaluations need, and some that do not fit."""
    folder = tmp_path_factory.mktemp("room")
    tiny_model(folder)
    tiny_generator(folder / "generator")
    feature_network(folder)
    lpips_network(folder)
    (folder / "text.pt").write_text("no network")
    make_dataset(folder, count=3)
    make_folders(folder, count=3)
    (folder / "empty").mkdir()
    for name in ("few", "odd"):
        shutil.copytree(folder / "input", folder / name)
    (folder / "few" / "photo_001.png").unlink()
    Image.new("RGB", (10, 9)).save(folder / "odd" / "photo_001.png")
    return folder


@pytest.fixture
def refused_there(room: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The same in the room, for one line of words; nothing may be written.   -> the line on stderr"""
    monkeypatch.chdir(room)

    def call(words: str) -> str:
        line = refused(*words.split(), "--out", tmp_path / "report")
        assert not (tmp_path / "report").exists()
        return line

    return call


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--protocol psnr", "protocol psnr is not known; choose one of generation, istd"),
        ("--protocol rgb+border", "+border is no modifier or comes twice; allowed are +borderN"),
        ("--protocol y+float+float", "+float is no modifier or comes twice"),
        ("--protocol generation+float", "protocol generation takes no +float"),
        ("--protocol istd", "protocol istd needs masks and data has none; give or pack it with --mask"),
        ("--protocol sidd", "photo_000 (input): protocol sidd takes 256x256 blocks, got 48x40"),
        ("--protocol rgb+border20", "a border of 20 pixels leaves nothing of 48x40"),
        ("--protocol generation", "protocol generation compares sets of images through a feature network"),
        ("--protocol generation --features features.pt", "what a model restores is scored by another one"),
        ("--metrics psnrr", "--metrics=psnrr is not known; choose from psnr, ssim"),
        ("--metrics lpips", "--metrics=lpips needs the file of its network; give --lpips FILE"),
        ("--metrics fid", "--metrics=fid needs a feature network; give --features FILE"),
        ("--metrics ms_ssim", "MS-SSIM needs images of at least 176x176 pixels, got 48x40"),
        ("--metrics is --features lpips.pt", "lpips.pt is an LPIPS network; give a feature network"),
        ("--lpips features.pt", "features.pt is a feature network; give an LPIPS network"),
        ("--lpips absent.pt", "absent.pt is not a file; get https://"),
        ("--features text.pt", "text.pt is no network"),
        ("--steps 0", "--steps=0 must be at least 1"),
        ("--steps 2,2", "each number once"),
        ("--steps none", "--steps=none must be numbers"),
        ("--steps 21", "must lie in 1..20"),
        ("--steps 1,21", "must lie in 1..20"),
        ("--samples 0", "--samples=0 must be from 1 to 1000"),
        ("--precision fp8", "--precision=fp8 is not known; choose fp32, bf16 or fp16"),
        ("--precision fp16", "--precision=fp16 needs a GPU"),
        ("--actors 2:1", "--actors=2:1 must be at least 1, with MIN not above MAX"),
        ("--actors 0:2", "--actors=0:2 must be at least 1"),
        ("--actors many", "--actors=many must be a number or MIN:MAX"),
        ("--gpus-per-actor 1", "--gpus-per-actor=1 is about actors and --actors=0 has none"),
        ("--num 2", "restores degraded images and generates none"),
        ("--input input --target target", "--data and --input name two sources; give one of them"),
        ("--split test", "--split=test does not go with --data"),
    ],
)
def test_evaluate_with_a_wrong_setting(refused_there: Refused, options: str, said: str) -> None:
    assert said in refused_there(f"evaluate model.safetensors --data data --actors 0 {options}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "give --data URI, or --input and --target folders"),
        ("--data nowhere", "nowhere is no packed dataset"),
        ("--data empty", "empty is no packed dataset"),
        ("--data input", "--data input holds no manifest.json"),
        ("--input input", "--input=input needs the clean images of the same names; give --target DIR"),
        ("--input empty --target target", "--input empty holds no images"),
        ("--input few --target target", "have no image of the same name in --input few: photo_001.png"),
        ("--input input --target few", "have no image of the same name in --target few: photo_001.png"),
        ("--input input --target target --mask few", "have no image of the same name in --mask few: photo_001.png"),
        ("--input odd --target target", "photo_001 (input): protocol rgb compares images of one size, got 10x9"),
        ("--list absent.tsv", "--list absent.tsv does not exist"),
    ],
)
def test_evaluate_with_a_wrong_source(refused_there: Refused, source: str, said: str) -> None:
    assert said in refused_there(f"evaluate model.safetensors --actors 0 {source}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "generates images from noise alone (diffusion.generate=true) and restores none"),
        ("--num 2", "protocol rgb compares pairs of images and --num makes images without partners"),
        ("--num 2 --protocol generation", "give --features FILE"),
        ("--num 2 --protocol generation --features lpips.pt", "lpips.pt is an LPIPS network"),
        ("--num 2 --protocol generation --features features.pt --metrics ssim", "--metrics=ssim compares pairs"),
        ("--num 2 --protocol generation --features features.pt --steps 1,21", "must lie in 1..20"),
    ],
)
def test_evaluate_of_generated_images_with_a_wrong_setting(refused_there: Refused, options: str, said: str) -> None:
    assert said in refused_there(f"evaluate generator/model.safetensors --data data --actors 0 {options}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("input", "give --target DIR with the clean images, or --data URI"),
        ("input --data data --target target", "--data and --target name two sources"),
        ("input --target target --protocol psnr", "protocol psnr is not known"),
        ("input --target target --protocol istd", "protocol istd needs masks and --target target has none"),
        ("input --target target --protocol generation", "give --features FILE"),
        ("input --target target --metrics fid", "--metrics=fid needs a feature network"),
        ("input --target target --lpips features.pt", "features.pt is a feature network"),
        ("input --target target --input few", "have no image of the same name in --input few: photo_001.png"),
        ("input --target empty", "--target empty holds no images"),
        ("input --target few", "1 of 3 images in input have no target of the same name: photo_001.png"),
        ("few --target target", "1 of 3 targets have no image of the same name in few: photo_001"),
        ("few --data data", "1 of 3 targets have no image of the same name in few: photo_001"),
        ("odd --target target", "photo_001 (restored): protocol rgb compares images of one size, got 10x9"),
        ("empty --target target", "empty holds no images"),
        ("absent --target target", "absent is not a folder"),
    ],
)
def test_score_with_wrong_images(refused_there: Refused, words: str, said: str) -> None:
    assert said in refused_there(f"score {words}")


def test_an_output_folder_that_is_a_file(refused: Refused, room: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for words in (("evaluate", room / "model.safetensors", "--actors", 0), ("score", room / "input")):
        line = refused(*words, "--data", room / "data", "--out", "file")
        assert "--out file cannot be written (Not a directory); choose another" in line
    assert (tmp_path / "file").read_text() == "no folder"


def test_reports_that_cannot_be_compared(refused: Refused, here: Here, room: Path, tmp_path: Path) -> None:
    """Of another protocol, of other targets, of an older format, none at all."""
    for name, options in {
        "rgb": ("--target", room / "target"),
        "y": ("--target", room / "target", "--protocol", "y"),
        "other": ("--target", room / "input"),
    }.items():
        assert here("score", room / "input", *options, "--out", name).code == 0
    report = json.loads((tmp_path / "rgb" / "report.json").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text(json.dumps({**report, "format_version": 1}))
    (tmp_path / "text.json").write_text("none")
    for other, said in (
        ("y", "scores of different protocols are not compared"),
        ("other", "are of different data"),
        ("old", "is of format 1 and lacks what a comparison needs; evaluate again"),
        ("text.json", "is not a report"),
        ("absent", "there is no report"),
        ("rgb", "is given twice"),
    ):
        line = refused("compare", "rgb", other, "--out", "table.md")
        assert said in line and not (tmp_path / "table.md").exists()


def test_unknown_commands_and_options_end_with_2_as_well(tmp_path: Path) -> None:
    for arguments in (["evalute"], ["train"], ["pack", "--jobs", "many", "--out", "x"]):
        result = rddm(*arguments, cwd=tmp_path)
        assert result.code == 2 and "Traceback" not in result.stderr, result.text


def test_some_unreadable_inputs_are_listed_and_the_rest_is_done(tiny_run: TinyRun, tmp_path: Path) -> None:
    make_folders(tmp_path, count=3)
    (tmp_path / "input" / "photo_001.png").write_bytes(b"no image")
    result = rddm("restore", str(tiny_run.run_dir), "input", "--out", "restored", cwd=tmp_path)
    assert result.code == 3, result.text
    assert "restored 2 of 3 image(s)" in result.stdout and "failed: input/photo_001.png" in result.stderr
    assert sorted(path.name for path in (tmp_path / "restored").iterdir()) == ["photo_000.png", "photo_002.png"]
