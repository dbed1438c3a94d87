"""`rddm checkpoint import` and `export`: files of the authors become models and models become files of the authors."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from rddm_dist.cli import main as entry
from rddm_dist.config import Config, iter_keys, parse_config
from rddm_dist.diffusion.schedule import make_schedule
from rddm_dist.exporting import USED, write_model_folder
from rddm_dist.factory import make_net, make_sampling_schedule
from rddm_dist.factory import make_schedule as schedule_of
from rddm_dist.loading import load_model
from rddm_dist.model.diffusers import CONFIG_FILE, WEIGHTS_FILE, UNet2D
from rddm_dist.model.diffusers import parse_config as parse_unet2d
from rddm_dist.model.net import build_net
from rddm_dist.model.published import LINEAGES, write_published
from rddm_dist.model.weights import load_safetensors
from tests.e2e.conftest import Here, TinyRun
from tests.support.datasets import make_dataset, make_folders

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"dim": 8, "dim_mults": (1, 2)}
ONE = {"kind": "unet", **SMALL, "num_nets": 1, "condition": "input", "self_condition": False}
TWO = {**ONE, "num_nets": 2}
SHARED = {**TWO, "kind": "shared_encoder"}

Call = Callable[..., str]


@pytest.fixture
def call(here: Here) -> Call:
    """Run the command line in this process, in tmp_path; it must end with this exit code.   -> what it said"""

    def run(*arguments: object, code: int = 0) -> str:
        result = here(*arguments)
        assert result.code == code, result.text
        if code:
            lines = result.stderr.splitlines()
            assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
            return lines[0]
        return result.stdout

    return run


def trainer_file(path: Path, model: dict[str, Any] = TWO, **settings: Any) -> dict[str, Tensor]:
    """Write a trainer file with drawn weights.   -> the weights"""
    torch.manual_seed(5)
    state = build_net(**model).state_dict()
    schedule = settings.pop("schedule", {})
    tables = make_schedule(**{"num_timesteps": 20, "parity": "official", **schedule})
    write_published(path, state, model=model, schedule=tables, **{"step": 3000, **settings})
    return state


def import_into(call: Call, name: str, *arguments: object) -> str:
    return call("checkpoint", "import", f"{name}.pt", "--out", f"models/{name}", *arguments)


def refused_import(call: Call, *arguments: object) -> str:
    """The line; nothing may be left behind."""
    before = sorted(Path.cwd().rglob("*"))
    line = call("checkpoint", "import", *arguments, "--out", "models/x", code=2)
    assert sorted(Path.cwd().rglob("*")) == before
    return line


def keys_of(config: Config) -> dict[str, Any]:
    """What decides how a model is used; of schedules, the tables count."""
    return {
        name: value
        for name, _, value in iter_keys(config)
        if name.startswith(USED) and not name.startswith(("diffusion.loss", "diffusion.schedule."))
    }


# -- import ------------------------------------------------------------------------------------------------------------


def test_an_imported_file_is_a_model_for_every_command(call: Call, tmp_path: Path) -> None:
    state = trainer_file(tmp_path / "model-3.pt", schedule={"kind": "power", "sum_scale": 0.01}, step=3000)
    said = import_into(call, "model-3", "sample.steps=2")
    assert "imported model-3.pt into models/model-3: step 3000, averaged weights, one_optimizer" in said
    for told in (
        "model.num_nets=2", "diffusion.schedule.kind=power", "diffusion.sum_scale=0.01",
        "assumed: diffusion.objective=pred_res_noise", "assumed: diffusion.residual_clip=[-1.0, 1.0]",
        "assumed: diffusion.time_input=index: files do not tell; clocks",
    ):  # fmt: skip
        assert told in said
    folder = tmp_path / "models" / "model-3"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "model.yaml"]
    loaded_state, values, extra = load_safetensors(folder / "model.safetensors")
    assert all(torch.equal(tensor, loaded_state[name]) for name, tensor in state.items())
    assert extra == {"step": "3000", "lineage": "one_optimizer", "source": "model-3.pt", "weights": "ema"}
    assert yaml.safe_load((folder / "model.yaml").read_text()) == values

    model = load_model(str(folder))
    assert model.path == str(folder / "model.safetensors") and model.config.diffusion.parity == "official"
    assert model.config.diffusion.residual_clip == (-1.0, 1.0)
    data = make_dataset(tmp_path, count=2, size=(16, 24))
    call("evaluate", folder, "--data", data, "--actors", 0, "--out", "report")
    report = json.loads(Path("report/report.json").read_text())
    assert report["model"]["weights_digest"] == model.digest and report["model"]["step"] == "3000"
    assert report["sampler"]["steps"] == 2 and len(report["images"]) == 2
    inputs, _ = make_folders(tmp_path / "photos", count=1, size=(16, 24))
    call("restore", folder, inputs, "--out", "restored")
    call("checkpoint", "export", folder, "--out", "again.safetensors")
    call("restore", "again.safetensors", inputs, "--out", "restored-again")
    one, other = (np.asarray(Image.open(tmp_path / name / "photo_000.png")) for name in ("restored", "restored-again"))
    assert one.shape == (16, 24, 3) and (one == other).all()


def test_a_preset_says_what_the_file_leaves_open(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "lol.pt", ONE)
    preset = tmp_path / "lol.yaml"
    preset.write_text(
        "{data: {preprocess: {equalize: true}}, diffusion: {objective: pred_res, residual_clip: [-2, 2]}, "
        "model: {dim: 8, dim_mults: [1, 2], num_nets: 1}, sample: {steps: 2}}"
    )
    said = import_into(call, "lol", "--config", preset, "sample.steps=3")
    assert (
        "as given: data.preprocess.equalize=true diffusion.objective=pred_res" in said
        and "assumed: diffusion.objective" not in said
    )
    config = load_model("models/lol").config
    assert config.data.preprocess.equalize and config.sample.steps == 3 and config.run.name == "lol"
    assert config.diffusion.num_timesteps == 20 and config.diffusion.parity == "official"  # not in the preset
    assert config.diffusion.residual_clip == (-2.0, 2.0)


def written(folder: Path) -> dict[str, tuple[int, ...]]:
    """All that is known of the files in a folder but when they were read."""
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {
        name: (stat.st_ino, stat.st_mode, stat.st_nlink, stat.st_uid, stat.st_gid)
        + (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for name, stat in found.items()
    }


def test_the_same_again_is_reused_and_another_model_is_left_alone(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "a.pt")
    import_into(call, "a")
    before = written(tmp_path / "models" / "a")
    assert "reused a.pt" in import_into(call, "a")
    line = call("checkpoint", "import", "a.pt", "--out", "models/a", "diffusion.time_input=clocks", code=2)
    assert "--out models/a holds another model already" in line
    assert written(tmp_path / "models" / "a") == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    for out, words in (("thesis", "holds thesis.tex and is no model folder"), ("a.pt", "is a file")):
        assert words in call("checkpoint", "import", "a.pt", "--out", out, code=2)
    assert "--out a.pt/x cannot be written" in call("checkpoint", "import", "a.pt", "--out", "a.pt/x", code=2)
    (tmp_path / "empty").mkdir()
    call("checkpoint", "import", "a.pt", "--out", "empty")
    assert load_model("empty").digest == load_model("models/a").digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "empty", "models", "thesis"]


def test_the_objective_follows_from_the_network_or_must_be_given(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "shared.pt", SHARED)
    import_into(call, "shared")
    assert load_model("models/shared").config.diffusion.objective == "pred_res_add_noise"
    for name, alpha_res, objective in (("res", 1.0, "pred_res"), ("noise", 0.3, "pred_noise")):
        trainer_file(tmp_path / f"{name}.pt", ONE, alpha_res=alpha_res, lineage="optimizer_per_net")
        said = import_into(call, name)
        assert f"assumed: diffusion.objective={objective}: the file's objective search stands at alpha_res" in said
        model = load_model(f"models/{name}")
        assert model.config.diffusion.objective == objective and float(model.extra["alpha_res"]) == pytest.approx(
            alpha_res
        )
        import_into(call, name, "diffusion.objective=auto")  # what such a file was trained with
    trainer_file(tmp_path / "open.pt", ONE, alpha_res=0.505)
    assert "0.505, undecided" in import_into(call, "open")
    trainer_file(tmp_path / "one.pt", ONE)
    line = refused_import(call, "one.pt")
    assert "does not tell what it predicts; give diffusion.objective, one of pred_res, pred_noise, pred_x0" in line
    import_into(call, "one", "diffusion.objective=pred_x0")
    assert load_model("models/one").config.diffusion.objective == "pred_x0"


def test_channels_that_can_be_read_in_two_ways_are_read_as_told(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "a.pt", {**TWO, "condition": "none", "self_condition": True})
    assert "assumed: model.condition=input: --self-condition if" in import_into(call, "a")
    assert load_model("models/a").config.model.condition == "input"
    said = call("checkpoint", "import", "a.pt", "--out", "b", "--self-condition")
    assert "assumed: diffusion.generate=false" in said and "assumed: model.condition" not in said
    call("checkpoint", "import", "a.pt", "--out", "c", "model.self_condition=true", "diffusion.generate=true")
    for name in ("b", "c"):
        model = load_model(name).config.model
        assert model.condition == "none" and model.self_condition
    assert "model.self_condition=true contradicts --no-self-condition" in refused_import(
        call, "a.pt", "model.self_condition=true", "--no-self-condition"
    )
    assert "then --self-condition" in refused_import(call, "a.pt", "model.condition=none")


def test_a_file_without_averaged_weights_gives_the_last_ones_and_says_so(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "a.pt")
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    del document["ema"]
    torch.save(document, tmp_path / "a.pt")
    said = import_into(call, "a")
    assert "weights of the last step" in said and "assumed: weights=model" in said
    assert "assumed: weights" not in call("checkpoint", "import", "a.pt", "--out", "b", "--weights", "model")
    assert "weights=best is not known; choose one of ema, model" in refused_import(call, "a.pt", "--weights", "best")


def test_a_schedule_that_the_file_does_not_tell_must_be_given(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "none.pt")
    document = torch.load(tmp_path / "none.pt", weights_only=True)
    module = document["model"]
    bare = {name: tensor for name, tensor in module.items() if name.startswith("model.")}
    torch.save({**document, "ema": {}, "model": bare}, tmp_path / "none.pt")
    odd = {**module, "alphas_cumsum": module["alphas_cumsum"] ** 1.1}
    torch.save({**document, "ema": {}, "model": odd}, tmp_path / "odd.pt")
    assert "none.pt holds no tables of its schedule; give diffusion.schedule.kind" in refused_import(call, "none.pt")
    assert "odd.pt holds tables of no known schedule; give" in refused_import(call, "odd.pt")
    said = import_into(call, "none", "diffusion.schedule.kind=power", "diffusion.num_timesteps=50")
    assert "assumed: diffusion.sum_scale=1.0" in said and "assumed: diffusion.parity=official" in said
    config = load_model("models/none").config.diffusion
    assert (config.schedule.kind, config.num_timesteps, config.sum_scale) == ("power", 50, 1.0)
    said = import_into(call, "odd", "diffusion.schedule.kind=linear")
    assert re.search(r"although alpha_cumsum\[\d+\] differs by 0\.0\d+ from the file", said)
    assert load_model("models/odd").config.diffusion.num_timesteps == 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.dim=16"], "model.dim=16 contradicts model-1.pt, which has 8"),
        (["model.dim_mults=[1, 2, 4]"], "model.dim_mults=[1, 2, 4] contradicts model-1.pt, which has [1, 2]"),
        (["model.num_nets=1"], "model.num_nets=1 contradicts model-1.pt, which has 2"),
        (["model.kind=shared_encoder"], "model.kind=shared_encoder contradicts model-1.pt, which has unet"),
        (["diffusion.objective=pred_res"], "diffusion.objective=pred_res contradicts model-1.pt, whose network has 2"),
        (["diffusion.objective=auto"], "choose one of pred_res_noise, pred_res_add_noise"),
        (["diffusion.num_timesteps=30"], "diffusion.num_timesteps=30 contradicts model-1.pt, which has 20"),
        (["diffusion.sum_scale=0.01"], "diffusion.sum_scale=0.01 contradicts model-1.pt, which has 1.0"),
        (["diffusion.schedule.kind=ddim"], "diffusion.schedule.kind=ddim contradicts model-1.pt, which has linear"),
        (["diffusion.schedule.alpha=average"], "diffusion.schedule.alpha=average contradicts model-1.pt"),
        (["diffusion.residual_clip=[1, -1]"], "diffusion.residual_clip=[1.0, -1.0] must be increasing"),
        (["diffusion.residual_clipp=1"], "unknown key diffusion.residual_clipp; did you mean diffusion.residual_clip"),
        (["model=3"], "model=3"),
        (["model.dim"], "must have the form section.key=value"),
        (["--config", "absent.yaml"], "config absent.yaml does not exist"),
    ],
)
def test_settings_that_contradict_the_file_are_refused(call: Call, tmp_path: Path, given: list[str], said: str) -> None:
    trainer_file(tmp_path / "model-1.pt")
    assert said in refused_import(call, "model-1.pt", *given)


def test_a_search_that_chose_otherwise_contradicts_the_given_objective(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "a.pt", ONE, alpha_res=1.0)
    line = refused_import(call, "a.pt", "diffusion.objective=pred_noise")
    assert "diffusion.objective=pred_noise contradicts a.pt, which has pred_res (alpha_res 1)" in line


def test_another_way_to_say_the_same_schedule_is_no_contradiction(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "a.pt", schedule={"kind": "power", "alpha": "average", "beta2": "average"})
    given = ["diffusion.schedule.kind=power", "diffusion.schedule.beta2=average", "diffusion.schedule.alpha=average"]
    import_into(call, "a", *given)
    flat = ["diffusion.schedule.alpha_power=0", "diffusion.schedule.beta2_power=0", "diffusion.schedule.kind=power"]
    call("checkpoint", "import", "a.pt", "--out", "flat", *flat)
    assert load_model("flat").config.diffusion.schedule.alpha == "decreased"
    trainer_file(tmp_path / "b.pt", schedule={"kind": "ddim", "sum_scale": 0.01})
    assert "assumed: diffusion.sum_scale=1.0: the authors' tables of kind ddim" in import_into(call, "b")
    call("checkpoint", "import", "b.pt", "--out", "scaled", "diffusion.sum_scale=0.01", "diffusion.schedule.kind=ddim")
    assert load_model("scaled").schedule.sum_scale == 0.01


class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


def test_files_that_are_no_trainer_files_are_refused_and_run_no_code(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**document, "scaler": Harmful(tmp_path / "trace")}, tmp_path / "harmful.pt")
    assert "code in it is not run" in refused_import(call, "harmful.pt")
    assert not (tmp_path / "trace").exists()
    torch.save({**document, "ema": {}, "model": {"model.unet0.a": torch.zeros(3)}}, tmp_path / "other.pt")
    assert "no network without the convolution unet0.init_conv.weight" in refused_import(call, "other.pt")
    strange = {**document["model"], "model.unet1.extra": torch.zeros(1)}
    torch.save({**document, "ema": {}, "model": strange}, tmp_path / "strange.pt")
    assert "unknown unet1.extra" in refused_import(call, "strange.pt")
    for name, content in (("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"text " * 100), ("empty.pt", b"\n")):
        (tmp_path / name).write_bytes(content)
        assert name in refused_import(call, name)
    assert "does not exist" in refused_import(call, "absent.pt")
    assert "is a folder; give the trainer's file" in refused_import(call, tmp_path)


# -- export ------------------------------------------------------------------------------------------------------------

SAMPLE = {"steps": 3, "path": [[0.5, 1.0], [0.0, 0.0]]}
VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (ONE, {"objective": "pred_res"}),
    (ONE, {"objective": "pred_noise", "schedule": {"kind": "ddim"}, "parity": "official", "time_input": "clocks"}),
    ({**ONE, "condition": "input_mask"}, {"objective": "pred_x0", "sum_scale": 0.01}),
    ({**ONE, "condition": "none", "self_condition": True}, {"objective": "pred_res", "generate": True}),
    (TWO, {"parity": "official", "residual_clip": [-1, 1]}),
    (TWO, {"objective": "pred_x0_noise", "schedule": {"kind": "power", "alpha_power": 0.3}}),
    ({**TWO, "condition": "input_mask"}, {"schedule": {"alpha_kind": "ddim", "betas": "squaredcos"}}),
    ({**TWO, "self_condition": True}, {"schedule": {"kind": "power", "beta2": "normal"}, "sum_scale": 2.0}),
    ({**TWO, "condition": "none"}, {"schedule": {"kind": "ddim"}, "sum_scale": 0.01, "parity": "official"}),
    ({**TWO, "condition": "none", "self_condition": True}, {"schedule": {"kind": "power", "alpha_power": 0.12345}}),
    (SHARED, {"objective": "pred_res_add_noise"}),
    ({**SHARED, "condition": "none"}, {"objective": "pred_res_noise"}),
    ({**SHARED, "condition": "input_mask", "self_condition": True}, {"objective": "pred_x0_add_noise"}),
]


def model_folder(folder: Path, model: dict[str, Any], diffusion: dict[str, Any], **sections: Any) -> None:
    """A model of ours with drawn weights."""
    values = {"model": model, "diffusion": {"num_timesteps": 30, **diffusion}, **sections}
    config = parse_config(values, source="test")
    torch.manual_seed(7)
    write_model_folder(folder, make_net(config).state_dict(), config=config, extra={"step": "12"})


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_export_and_import_give_the_model_back(call: Call, tmp_path: Path, variant: int) -> None:
    """Bit for bit the weights and the tables; what the layout cannot say is named by the export and given again."""
    model, diffusion = VARIANTS[variant]
    ema, lineage = variant % 2 == 0, LINEAGES[variant % 4 > 1 and model["kind"] == "unet"]
    model_folder(tmp_path / "ours", model, diffusion, sample=SAMPLE, data={"preprocess": {"pad_multiple": 4}})
    said = call("checkpoint", "export", "ours", "--out", "model-1.pt", "--lineage", lineage)
    document = torch.load("model-1.pt", weights_only=True)
    assert ("opt0" in document) == (lineage == "optimizer_per_net") and document["step"] == 12
    if not ema:
        wrapped = {name.replace("model.", "model.module.", 1): t for name, t in document["model"].items()}
        del document["ema"]
        torch.save({**document, "model": wrapped}, "model-1.pt")
    told = re.search(r"give it to rddm checkpoint import: (.*)", said)
    given = shlex.split(told[1]) if told else []
    assert "data.preprocess.pad_multiple=4" in given and "sample.steps=3" in given
    call("checkpoint", "import", "model-1.pt", "--out", "theirs", *given)
    ours, theirs = load_model("ours"), load_model("theirs")
    assert theirs.digest == ours.digest and theirs.extra["step"] == "12" and theirs.extra["lineage"] == lineage
    assert keys_of(theirs.config) == keys_of(ours.config)
    for name, value in vars(ours.schedule).items():
        other = getattr(theirs.schedule, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name
    call("checkpoint", "export", "theirs", "--out", "again.pt")
    if ema:
        assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "model-1.pt").read_bytes()


def test_every_layout_loads_as_the_same_model(call: Call, tmp_path: Path) -> None:
    model_folder(tmp_path / "ours", TWO, {}, sample={"schedule": {"alpha_kind": "power"}})
    ours = load_model("ours")
    outs = {"copy": "auto", "file.safetensors": "auto", "named": "safetensors", "deep/er": "folder"}
    for out, layout in outs.items():
        for word in ("exported", "reused"):
            assert word in call("checkpoint", "export", "ours", "--out", out, "--layout", layout)
        model = load_model(out)
        assert model.digest == ours.digest and model.config == ours.config and model.extra == ours.extra
    said = call("checkpoint", "export", "ours", "--out", "authors", "--layout", "published")
    assert "sample.schedule.alpha_kind=power" in said
    # The file holds the tables of training, not those of sampling.
    alphas = torch.load("authors", weights_only=True)["model"]["alphas_cumsum"]
    assert torch.equal(alphas, schedule_of(ours.config.diffusion).alpha_cumsum[1:])
    assert not torch.equal(alphas, make_sampling_schedule(ours.config).alpha_cumsum[1:])


def test_an_objective_search_survives_both_ways(call: Call, tmp_path: Path) -> None:
    trainer_file(tmp_path / "a.pt", ONE, alpha_res=0.75, lineage="optimizer_per_net")
    import_into(call, "a")
    assert "diffusion.objective" not in call("checkpoint", "export", "models/a", "--out", "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_run_is_exported_as_its_averaged_weights(call: Call, tiny_run: TinyRun, tmp_path: Path) -> None:
    said = call("checkpoint", "export", tiny_run.run_dir, "--out", "tiny.pt")
    assert "import: diffusion.objective=pred_res 'diffusion.residual_clip=[-2.0, 2.0]' sample.steps=2" in said
    import_into(call, "tiny", "diffusion.objective=pred_res", "diffusion.residual_clip=[-2.0, 2.0]", "sample.steps=2")
    run, model = load_model(str(tiny_run.run_dir)), load_model("models/tiny")
    assert model.digest == run.digest and model.extra["step"] == run.extra["step"] == "10"
    for name, loaded in (("run", run), ("model", model)):
        call("evaluate", loaded.path, "--data", tiny_run.data, "--actors", 0, "--limit", 2, "--out", name)
    one, other = (json.loads(Path(f"{name}/report.json").read_text()) for name in ("run", "model"))
    assert one["images"] == other["images"] and one["scores"] == other["scores"]


@pytest.mark.parametrize(
    ("diffusion", "model", "arguments", "said"),
    [
        ({"process": "ddpm", "objective": "pred_v"}, ONE, [], "no model of diffusion.process=ddpm"),
        ({"objective": "auto"}, ONE, [], "the search of this run has not ended"),
        ({}, TWO, ["--lineage", "exp9"], "lineage=exp9 is not known; choose one of one_optimizer, optimizer_per_net"),
        ({}, SHARED, ["--lineage", "optimizer_per_net"], "optimizer_per_net has no shared_encoder network"),
        ({}, TWO, ["--layout", "onnx"], "--layout=onnx is not known; choose one of auto, folder, safetensors"),
        ({}, TWO, ["--out", "x.pth"], "--out x.pth: name a file .safetensors or .pt, or say what it is with --layout"),
        ({}, TWO, ["--layout", "folder", "--lineage", "one_optimizer"], "--lineage=one_optimizer goes with --layout"),
    ],
)
def test_what_the_layout_does_not_hold_is_refused(
    call: Call, tmp_path: Path, diffusion: dict[str, Any], model: dict[str, Any], arguments: list[str], said: str
) -> None:
    model_folder(tmp_path / "ours", model, diffusion)
    assert said in call("checkpoint", "export", "ours", "--out", "x.pt", *arguments, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_exports_replace_nothing_and_need_a_model(call: Call, tmp_path: Path) -> None:
    model_folder(tmp_path / "ours", TWO, {})
    for out in ("x.pt", "x.safetensors"):
        (tmp_path / out).write_text("precious")
        assert f"--out {out} holds another model already" in call("checkpoint", "export", "ours", "--out", out, code=2)
        assert (tmp_path / out).read_text() == "precious"
    assert "is a folder; give the name of a file" in call(
        "checkpoint", "export", "ours", "--out", "ours", "--layout", "safetensors", code=2
    )
    (tmp_path / "nothing").mkdir()
    for model, said in (
        ("absent", "does not exist; give a run folder, a model folder"),
        ("nothing", "is neither a run folder, a checkpoint inside one, nor a model folder"),
        ("models:/demo@champion", "there is no registry at"),
    ):
        store = f"sqlite:///{tmp_path / 'mlflow.db'}"
        assert said in call("checkpoint", "export", model, "--out", "y", "--tracking-uri", store, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nothing", "ours", "x.pt", "x.safetensors"]


# -- the guide ---------------------------------------------------------------------------------------------------------


def test_the_guides_snippet_samples_a_converted_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/models.md, with a small network in place of the downloaded one and smaller images."""
    values = {
        "_class_name": "UNet2DModel", "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": None,
    }  # fmt: skip
    torch.manual_seed(0)
    net = UNet2D(parse_unet2d(values, source="test"))
    folder = tmp_path / "ddpm-celebahq-256"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    save_file(net.state_dict(), folder / WEIGHTS_FILE)
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.DOTALL)
    assert snippet is not None and "size = 256\n" in snippet[1]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet[1].replace("size = 256\n", "size = 16\n"), names)
    assert names["images"].shape == (4, 3, 16, 16) and bool(names["images"].isfinite().all())
    torch.testing.assert_close(names["images"], names["same"], rtol=1e-4, atol=1e-4)
    assert (names["images"] - names["other"]).abs().max() > 0.1


def test_the_guides_commands_are_understood(tmp_path: Path) -> None:
    """Every option that docs/models.md shows exists."""
    text = (ROOT / "docs" / "models.md").read_text()
    commands = [line.split("#")[0] for line in text.splitlines() if line.startswith("    rddm checkpoint ")]
    assert len(commands) >= 6
    from typer.main import get_command

    group = get_command(entry.app)
    for command in commands:
        _, _, name, *arguments = shlex.split(command)
        checkpoint = group.commands["checkpoint"]  # type: ignore[attr-defined]
        checkpoint.commands[name].make_context(name, arguments)
