"""Feature networks from files: Inception's form, exported programs, kinds told apart, and files nobody vouches for."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from data_pipeline.errors import ConfigError, ModelError
from rddm_dist.cli import features as command
from rddm_dist.evaluation.features import load_features, load_lpips
from rddm_dist.evaluation.networks.architectures import ARCHITECTURES, convert, get_architecture
from rddm_dist.evaluation.networks.inception import Block8, Block35, InceptionV3

TORCHVISION_PARAMETERS = 27_161_264  # of its inception_v3, with 1000 classes and the auxiliary classifier
AUXILIARY = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000


class Small(nn.Module):
    """Features of 5 numbers, and logits of 4."""

    def __init__(self, *, gives_logits: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.gives_logits = nn.Conv2d(3, 5, 3), nn.Linear(5, 4), gives_logits

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.conv(images / 255).relu().mean(dim=(2, 3))
        if self.gives_logits:
            return features, self.fc(features)
        return features


class Sized(nn.Module):
    """Resizes by the size of the images and computes with it, so that sizes in the graph are expressions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear")
        x = self.conv(nn.functional.pad(x, (1, 2, 0, 1)))
        return x.flatten(2).mean(2) + images.shape[2] // 3


class Distance(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().flatten(1).mean(1)


class WholeDistance(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean()


class Triple(nn.Module):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x + y + z


class Shaped(nn.Module):
    """Gives something else than features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.mean(dim=(2, 3)), 0.5, training=True)


ANY_SHAPE = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}


def images(count: int = 2, height: int = 20, width: int = 31) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3)) * 255


def export_pt2(net: nn.Module, path: Path, *, arguments: int = 1, is_dynamic: bool = True) -> Path:
    shapes = tuple(ANY_SHAPE for _ in range(arguments)) if is_dynamic else None
    examples = tuple(images() for _ in range(arguments))
    program = torch.export.export(net.eval(), examples, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def export_script(net: nn.Module, path: Path, *, arguments: int = 1) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(net.eval(), tuple(images() for _ in range(arguments)), check_trace=False).save(path)
    return path


EXPORTS: dict[str, Callable[..., Path]] = {"n.pt2": export_pt2, "n.pt": export_script}


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[InceptionV3, Path]:
    """A random Inception, and its weights as the published file holds them: with counters of batches."""
    torch.manual_seed(0)
    net = InceptionV3().eval().requires_grad_(False)
    state = net.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(1) for name in state if "var" in name}
    path = tmp_path_factory.mktemp("inception") / "published.pth"
    torch.save({**state, **counters}, path)
    return net, path


def test_a_converted_inception_gives_what_the_network_gives(
    inception: tuple[InceptionV3, Path], tmp_path: Path
) -> None:
    net, weights = inception
    out = convert("inception-v3-fid", weights=weights, out=tmp_path / "a" / "inception.safetensors")
    network = load_features(out)
    x = images(2, 40, 60)
    features, logits = network(x)
    expected, expected_logits = net(x)
    assert features.shape == (2, 2048) and logits is not None and logits.shape == (2, 1008)
    assert torch.equal(features, expected) and torch.equal(logits, expected_logits)
    assert not torch.equal(features[0], features[1])
    # The bias of the last layer is left out.
    assert torch.allclose(logits, net.fc(features) - net.fc.bias, atol=1e-5)
    assert (network.dim, network.has_logits) == (2048, True)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert network.describe() == {"name": "inception-v3-fid", "sha256": digest, "dim": 2048, "logits": True}
    with pytest.raises(
        ModelError, match="--lpips .*is a feature network; give an LPIPS network .*this one to --features"
    ):
        load_lpips(out)


def test_inception_has_the_parameters_of_torchvisions_without_the_auxiliary_classifier() -> None:
    with torch.device("meta"):
        net = InceptionV3()
    more_classes = 8 * (2048 + 1)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == TORCHVISION_PARAMETERS - AUXILIARY + more_classes
    state = net.state_dict()
    assert state["fc.weight"].shape == (1008, 2048) and state["fc.bias"].shape == (1008,)
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6b.branch7x7dbl_5.conv.weight"].shape == (192, 128, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)


def test_pools_of_inception_leave_the_padding_out() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 8, 6, 6)
    for block, pooled in ((Block35(8, pooled=4), 4), (Block8(8, pools_maximum=False), 192)):
        values = block.eval()(x)[:, -pooled:]
        assert torch.allclose(values, values[:, :, :1, :1].expand_as(values)) and values.max() > 0


def test_the_last_block_of_inception_takes_maxima() -> None:
    x = torch.randn(1, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    block = Block8(8, pools_maximum=True).eval()
    grown = nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, stride=1)
    assert torch.equal(block(x)[:, -192:], block.branch_pool(grown))
    net = InceptionV3()
    assert net.Mixed_7c.pools_maximum and not net.Mixed_7b.pools_maximum


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("gives_logits", [False, True])
def test_an_exported_network_gives_what_the_module_gives_for_any_shape(
    tmp_path: Path, name: str, gives_logits: bool
) -> None:
    net = Small(gives_logits=gives_logits).eval().requires_grad_(False)
    network = load_features(EXPORTS[name](net, tmp_path / name))
    assert (network.name, network.dim, network.has_logits) == ("n", 5, gives_logits)
    assert network.digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    for x in (images(1, 9, 12), images(5, 33, 20)):
        features, logits = network(x)
        expected = net(x)
        assert torch.allclose(features, expected[0] if gives_logits else expected, atol=1e-6)
        assert features.dtype == torch.float32 and not features.requires_grad
        assert (logits is None) is not gives_logits
        if logits is not None:
            assert torch.allclose(logits, expected[1], atol=1e-6)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_distance_is_an_lpips_network(tmp_path: Path, name: str) -> None:
    path = EXPORTS[name](Distance(), tmp_path / name, arguments=2)
    x, y = images(3), images(3).flip(0)
    network = load_lpips(path)
    distance = network(x, y)
    assert network.smallest == 1  # programs do not say
    assert distance.dtype == torch.float64 and torch.allclose(distance.float(), Distance()(x, y))
    with pytest.raises(ModelError, match="^--features .* is an LPIPS network; give a feature network"):
        load_features(path)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_feature_network_is_no_lpips_network(tmp_path: Path, name: str) -> None:
    path = EXPORTS[name](Small(), tmp_path / name)
    with pytest.raises(ModelError, match="^--lpips .* is a feature network; give an LPIPS network"):
        load_lpips(path)


@pytest.mark.parametrize(
    ("net", "arguments", "told"),
    [
        (Triple(), 3, "is a program of 3 arguments"),
        (Shaped(), 1, r"gives \(2, 64, 64\) for 2 images; a feature network gives \(B, D\)"),
        (Dropping(), 1, "gives other numbers for the same images; export it in evaluation mode"),
    ],
)
def test_programs_of_another_form_are_refused(tmp_path: Path, net: nn.Module, arguments: int, told: str) -> None:
    path = export_script(net, tmp_path / "n.pt", arguments=arguments)
    with pytest.raises(ModelError, match=told):
        load_features(path)


def test_a_distance_of_another_form_is_refused(tmp_path: Path) -> None:
    x = images()
    program = torch.export.export(Distance(), (x, x), dynamic_shapes=(ANY_SHAPE, ANY_SHAPE))
    torch.export.save(program, tmp_path / "same.pt2")
    with pytest.raises(ModelError, match="gives 0 for different images; export it with two different example tensors"):
        load_lpips(tmp_path / "same.pt2")
    path = export_script(WholeDistance(), tmp_path / "n.pt", arguments=2)
    with pytest.raises(ModelError, match=r"gives \(\) for 2 pairs of images; an LPIPS network gives \(B,\)"):
        load_lpips(path)


def test_a_network_exported_for_one_size_says_what_to_export(tmp_path: Path) -> None:
    path = export_pt2(Small(), tmp_path / "n.pt2", is_dynamic=False)
    with pytest.raises(ModelError, match="fails on images of shape .* export it with a dynamic batch size"):
        load_features(path)


@pytest.mark.parametrize("name", EXPORTS)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str) -> None:
    net = Small()
    net.conv.weight.data[0] = float("nan")
    path = EXPORTS[name](net, tmp_path / name)
    with pytest.raises(ModelError, match="not finite"):
        load_features(path)


class Marking:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def tampered(source: Path, out: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes]) -> Path:
    """A copy of an archive, with other contents and further members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return out


WEIGHTS_CONFIG = "data/weights/model_weights_config.json"


def pickled_weight(config: bytes) -> bytes:
    """The configuration of weights, asking for one to be unpickled."""
    document = json.loads(config)
    document["config"]["conv.weight"] |= {"use_pickle": True, "path_name": "weight_9", "tensor_meta": None}
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("kind", "is_refused"), [("sample inputs", False), ("old weights", False), ("weight", True), ("object", True)]
)
def test_nothing_in_an_exported_program_is_unpickled(tmp_path: Path, kind: str, is_refused: bool) -> None:
    marker = tmp_path / "marker"
    torch.save(Marking(marker), tmp_path / "evil.pt")
    saved, pickled = (tmp_path / "evil.pt").read_bytes(), pickle.dumps(Marking(marker))

    def change(place: str, content: bytes) -> bytes:
        if kind == "sample inputs" and place.startswith("data/sample_inputs/"):
            return saved
        if kind == "weight" and place == WEIGHTS_CONFIG:
            return pickled_weight(content)
        if kind == "object" and place == "data/constants/model_constants_config.json":
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"x": entry}}).encode()
        return content

    more = {
        "weight": {"data/weights/weight_9": saved},
        "object": {"data/constants/opaque_obj_0": pickled},
        "old weights": {"data/weights/model.pt": saved},
    }
    sound = export_pt2(Small(), tmp_path / "sound.pt2")
    assert load_features(tampered(sound, tmp_path / "same.pt2", lambda _, content: content, {})).dim == 5
    path = tampered(sound, tmp_path / "evil.pt2", change, more.get(kind, {}))
    if is_refused:
        with pytest.raises(ModelError, match="holds more than plain tensors, and code in it is not run"):
            load_features(path)
    else:  # left out of what PyTorch is given
        assert torch.equal(load_features(path)(images())[0], load_features(sound)(images())[0])
    assert not marker.exists()
    if kind != "object":  # not all versions of PyTorch know these
        with suppress(Exception):
            torch.export.load(path)
        assert marker.exists()  # it would have been, without the check


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("is_evil_first", [True, False])
@pytest.mark.parametrize("other_name", [WEIGHTS_CONFIG, "Data/weights/MODEL_weights_config.json"])
def test_of_members_of_one_name_that_is_checked_which_pytorch_reads(
    tmp_path: Path, other_name: str, is_evil_first: bool
) -> None:
    marker = tmp_path / "marker"
    torch.save(Marking(marker), tmp_path / "evil.pt")
    with zipfile.ZipFile(export_pt2(Small(), tmp_path / "sound.pt2")) as archive:
        root = archive.namelist()[0].partition("/")[0]
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    sound = members.pop(WEIGHTS_CONFIG)
    configs = (pickled_weight(sound), sound) if is_evil_first else (sound, pickled_weight(sound))
    path = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in zip((other_name, WEIGHTS_CONFIG), configs, strict=True):
            archive.writestr(f"{root}/{name}", content)
        for name, content in members.items():
            archive.writestr(f"{root}/{name}", content)
        archive.writestr(f"{root}/data/weights/weight_9", (tmp_path / "evil.pt").read_bytes())
    if is_evil_first:
        with pytest.raises(ModelError, match="holds more than plain tensors, and code in it is not run"):
            load_features(path)
    else:
        assert load_features(path).dim == 5
    assert not marker.exists()
    with suppress(Exception):
        torch.export.load(path)
    assert marker.exists() is is_evil_first  # PyTorch takes the first


@pytest.mark.parametrize("kind", ["size", "hidden size", "name"])
def test_text_in_an_exported_program_that_does_something_is_not_evaluated(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def change(place: str, content: bytes) -> bytes:
        if place != "models/model.json":
            return content
        if kind == "name":  # of an argument: PyTorch writes it into the head of a function
            return content.replace(b'"images"', json.dumps(f"images={code}").encode())
        argument = "images" if kind == "size" else "metadata"  # as the notes are called, which are not looked at
        document = json.loads(content.replace(b'"images"', f'"{argument}"'.encode()))
        values = document["graph_module"]["graph"]["tensor_values"]
        values[argument]["sizes"][0]["as_expr"]["expr_str"] = code
        return json.dumps(document).encode()

    path = tampered(export_pt2(Small(), tmp_path / "sound.pt2"), tmp_path / "evil.pt2", change, {})
    told = "cannot be loaded" if kind == "hidden size" else "holds more than names and sizes .*code in it is not run"
    with pytest.raises(ModelError, match=told):
        load_features(path)
    assert not marker.exists()
    with suppress(Exception):
        torch.export.load(path)
    assert marker.exists()  # it would have been, without the check


def test_programs_that_compute_with_sizes_are_loaded(tmp_path: Path) -> None:
    net = Sized().eval()
    path = export_pt2(net, tmp_path / "n.pt2")
    with zipfile.ZipFile(path) as archive:
        graph = archive.read(next(name for name in archive.namelist() if name.endswith("models/model.json")))
    assert b"FloorDiv(" in graph and b"Max(" in graph
    x = images(3, 41, 30)
    assert torch.equal(load_features(path)(x)[0], net(x))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"torch.ops.aten.relu.default"', b'"torch.os.system"'),  # refused by PyTorch with an error of its own kind
        (b'"torch.ops.aten.relu.default"', b'"_operator.getitem"'),
        (b'"torch.ops.aten.relu.default"', b'"torch.ops.aten.relu.nothing"'),
        (b'"p_conv_weight"', b'"x y"'),
        (b'"images"', b'"for"'),
        (b'"expr_str": "Symbol', b'"expr_str": "Integer'),
        (b'"expr_str": "', b'"expr_str": "((('),
        (b'"nodes": [', b'"knots": ['),
        (b'"as_tensor"', b'"as_int"'),
        (b"builtins.tuple", b"builtins.nothing"),
        (b'"TRAINING"', b'"NOTHING"'),
        (b"}", b""),
        (b"{", b"\xff"),
    ],
)
def test_a_malformed_program_is_refused_in_one_line(
    tmp_path: Path, old: bytes, new: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def change(place: str, content: bytes) -> bytes:
        if place != "models/model.json":
            return content
        assert old in content
        return content.replace(old, new)

    path = tampered(export_pt2(Small(), tmp_path / "sound.pt2"), tmp_path / "n.pt2", change, {})
    caplog.clear()
    with warnings.catch_warnings(record=True) as warned, pytest.raises(ModelError) as caught:
        load_features(path)
    assert not [warning for warning in warned if issubclass(warning.category, UserWarning)]
    assert "n.pt2" in str(caught.value) and "\n" not in str(caught.value)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_published_weights_that_hold_code_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"fc.weight": Marking(tmp_path / "marker")}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="--weights .* is no file of weights that PyTorch saved"):
        convert("inception-v3-fid", weights=tmp_path / "evil.pth", out=tmp_path / "x.safetensors")
    assert not (tmp_path / "marker").exists() and not (tmp_path / "x.safetensors").exists()


def test_a_missing_file_says_where_to_get_one(tmp_path: Path) -> None:
    told = (
        r"is not a file; get https://github\.com/mseitzer/pytorch-fid/.* rddm features convert --architecture inception"
    )
    with pytest.raises(ModelError, match=told):
        load_features(tmp_path / "no.safetensors")
    with pytest.raises(ModelError, match=r"get https://download\.pytorch\.org/models/alexnet-owt-7be5be79\.pth"):
        load_lpips(tmp_path / "no.pt2")
    with pytest.raises(ModelError, match="--weights .* does not exist; get https"):
        convert("lpips-vgg", weights=tmp_path / "no.pth", out=tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["n.safetensors", "n.pt2", "n.pt", "n"])
@pytest.mark.parametrize("content", [b"", b"no network at all", b"PK\x03\x04" + bytes(200), bytes(2000)])
def test_files_that_are_no_networks_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_features(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", EXPORTS)
def test_programs_cut_short_are_refused(tmp_path: Path, name: str) -> None:
    path = EXPORTS[name](Small(), tmp_path / name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError):
        load_features(path)


@pytest.mark.parametrize("name", EXPORTS)
def test_archives_with_a_damaged_directory_are_refused(tmp_path: Path, name: str) -> None:
    path = EXPORTS[name](Small(), tmp_path / name)
    data = bytearray(path.read_bytes())
    disks = data.rindex(b"PK\x06\x07") + 16  # in the locator of the end of a zip64 directory
    data[disks] = 7
    path.write_bytes(data)
    with pytest.raises(ModelError, match="is no network"):
        load_features(path)


def test_weights_alone_are_sent_to_the_converter(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="weights alone go through rddm features convert"):
        load_features(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (None, "does not say which network it holds"),
        ({"architecture": "resnet"}, "holds a network resnet; known are inception-v3-fid, lpips-alex, lpips-vgg"),
        ({"architecture": "inception-v3-fid"}, "is no inception-v3-fid network: it has no parameter Conv2d_1a_3x3"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, metadata: dict[str, str] | None, told: str) -> None:
    save_file({"fc.bias": torch.zeros(1008)}, tmp_path / "n.safetensors", metadata=metadata)
    with pytest.raises(ModelError, match=told):
        load_features(tmp_path / "n.safetensors")


def test_misshapen_and_damaged_parameters_are_told_by_name(tmp_path: Path) -> None:
    def refusal(weights: Any) -> str:
        torch.save(weights, tmp_path / "weights.pth")
        with pytest.raises(ModelError) as caught:
            convert("lpips-alex", weights=tmp_path / "weights.pth", out=tmp_path / "x.safetensors")
        return str(caught.value)

    state = ARCHITECTURES["lpips-alex"].make().state_dict()
    told = refusal({**state, "features.3.weight": torch.zeros(192, 64, 3, 3)})
    assert "features.3.weight is (192, 64, 3, 3), not (192, 64, 5, 5); get https://download.pytorch.org" in told
    assert "features.6.bias holds numbers that are not" in refusal(
        {**state, "features.6.bias": torch.full((384,), torch.inf)}
    )
    del state["features.8.bias"]
    assert "it has no parameter features.8.bias" in refusal(state)
    assert "is not a state dict of tensors" in refusal([1, 2])


def test_flags_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--architecture=vgg is not known; choose one of inception-v3-fid"):
        get_architecture("vgg")
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        convert("lpips-alex", weights=tmp_path / "a.pth", out=tmp_path / "a.pt")


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8)])
def test_images_of_another_form_are_a_mistake_of_the_caller(tmp_path: Path, shape: tuple[int, ...]) -> None:
    network = load_features(export_script(Small(), tmp_path / "n.pt"))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) float32"):
        network(torch.zeros(shape))
    with pytest.raises(ValueError, match="float32; got .* torch.uint8"):
        network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_a_network_runs_in_float32_whatever_it_stands_in(tmp_path: Path) -> None:
    network = load_features(export_script(Small(), tmp_path / "n.pt"))
    x = images()
    expected, _ = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = network(x)
    assert torch.equal(features, expected)


def test_the_command_converts_and_says_what_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = ARCHITECTURES["lpips-alex"].make()
    torch.save({name: tensor for name, tensor in net.state_dict().items() if "features" in name}, "alexnet.pth")
    app = typer.Typer()
    command.register(app)
    arguments = ["features", "convert", "--architecture", "lpips-alex", "--weights", "alexnet.pth", "--out"]
    result = CliRunner().invoke(app, [*arguments, "lpips.safetensors"])
    assert result.exit_code == 0, result.output
    assert "converted alexnet.pth into lpips.safetensors: lpips-alex, sha256 " in result.output
    assert load_lpips("lpips.safetensors").digest[:12] in result.output
    again = CliRunner().invoke(app, [*arguments, "again.safetensors"])
    assert again.exit_code == 0
    assert Path("again.safetensors").read_bytes() == Path("lpips.safetensors").read_bytes()
