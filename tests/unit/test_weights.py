"""Weight files and digests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import ModelError
from rddm_dist.model.weights import load_safetensors, save_safetensors, weights_digest

CONFIG = {"model": {"dim": 16, "dim_mults": [1, 2]}, "note": "text"}


def state() -> dict[str, Tensor]:
    flat = torch.arange(30, dtype=torch.float32)
    return {
        "b.weight": flat[:24].view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "a.bias": flat[24:],
        "half": torch.tensor([[0.1, -2.0]], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, state(), config=CONFIG, extra={"data_digest": "ab", "step": "400"})
    loaded, config, extra = load_safetensors(path)
    assert config == CONFIG and extra == {"data_digest": "ab", "step": "400"}
    assert set(loaded) == set(state())
    for name, tensor in state().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert weights_digest(loaded) == weights_digest(state())


def test_equal_weights_give_equal_bytes_and_no_leftovers(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save_safetensors(one, state(), config=CONFIG, extra={"x": "1", "y": "2"})
    save_safetensors(other, dict(reversed(state().items())), config=CONFIG, extra={"y": "2", "x": "1"})
    assert one.read_bytes() == other.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, state(), config=CONFIG)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_safetensors(path, state(), config={"bad": object()})
    shared = torch.ones(4)
    with pytest.raises(RuntimeError):
        save_safetensors(path, {"a": shared, "b": shared}, config=CONFIG)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_digest_sees_name_type_shape_and_value_but_not_order_or_layout() -> None:
    base = state()
    digest = weights_digest(base)
    assert weights_digest(dict(reversed(base.items()))) == digest
    assert weights_digest({**base, "b.weight": base["b.weight"].contiguous()}) == digest
    assert weights_digest({**base, "a.bias": base["a.bias"] + 1e-6}) != digest
    assert weights_digest({**base, "a.bias": base["a.bias"].view(2, 3)}) != digest
    assert weights_digest({**base, "count": base["count"].double()}) != digest
    renamed = {("other" if name == "half" else name): tensor for name, tensor in base.items()}
    assert weights_digest(renamed) != digest


def test_missing_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match="do not exist"):
        load_safetensors(path)
    save_safetensors(path, state(), config=CONFIG)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], whole[:4], b"", b"PK\x03\x04 a pickle" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="model.safetensors cannot be read") as error:
            load_safetensors(path)
        assert "\n" not in str(error.value)
    save_file({"a": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not written by this project"):
        load_safetensors(path)
    save_file({"a": torch.ones(1)}, path, metadata={"rddm": '{"format_version": 2}'})
    with pytest.raises(ModelError, match="format version 2, newer"):
        load_safetensors(path)


def test_a_file_of_weights_may_be_read_by_whoever_may_read_a_new_file(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model.safetensors", state(), config=CONFIG)
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
