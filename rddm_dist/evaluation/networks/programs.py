"""Networks that others exported: torch.export's .pt2 files, and TorchScript.

A program is code: what it computes, and what PyTorch runs to rebuild it, is the word of whoever made the file. Load
only what you would run; a .safetensors file of a known architecture holds numbers alone.

What torch.export.load does in PyTorch 2.11 and 2.13: weights and tensor constants lie in the archive as raw bytes, but
a payload may ask to be unpickled (tensor subclasses, custom objects, in 2.13 opaque ones), which PyTorch does without
weights_only; sample inputs, and whole state dicts of older versions, are tried with weights_only and, where that fails,
without. Compiled libraries are loaded, sizes are evaluated as Python expressions, and names in the graph become Python
source. So PyTorch is not given the file but a copy of what has been looked at: the graph with names and sizes that
cannot call anything, and raw tensors. It is read by PyTorch's own reader, since others see another member where names
are repeated or differ in case. torch.jit.load has a reader of its own that makes no Python objects.
Neither is a sandbox.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.errors import ModelError

MODEL, SAMPLE_INPUTS, VERSION = "models/model.json", "data/sample_inputs/model.pt", "archive_version"
PAYLOADS = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}
RAW_PAYLOAD = re.compile(r"(weight|tensor)_\d+")  # names of payloads that are bytes of tensors
# Names, operators, and the JSON of how arguments nest; without parentheses and = nothing in it is called or assigned.
PLAIN_TEXT = re.compile(r'[\w .:,#*+<>/"\[\]{}\\-]*')
SIZE_TEXT = re.compile(r"[\w\s(),='.+*/<>&|~-]*")
SIZE_WORD = re.compile(
    r"(s|u|f|zf|zuf|ps)\d+|Symbol|integer|(non)?(positive|negative|zero)|real|finite|even|odd|precision|"
    "Integer|Rational|Float|Add|Mul|Pow|Abs|Mod|Max|Min|floor|ceiling|true|false|True|False|oo|int_oo|And|Or|Not|"
    "Equality|Unequality|(Strict)?(Less|Greater)Than|Eq|Ne|Le|Lt|Ge|Gt|FloorDiv|ModularIndexing|Where|PythonMod|"
    "CleanDiv|CeilDiv|IntTrueDiv|FloatTrueDiv|CeilToInt|FloorToInt|TruncToInt|RoundToInt|TruncToFloat|ToFloat|"
    "RoundDecimal|LShift|RShift|PowByNatural|FloatPow|IsNonOverlappingAndDenseIndicator|Identity"
)

Format = Literal["pt2", "torchscript"]


@dataclass(frozen=True, eq=False)
class Program:
    """An exported network. run: takes `num_images` tensors of images and returns what the network returns."""

    run: Callable[..., Any]
    num_images: int


def program_format(path: Path) -> Format | None:
    """What kind of program a file is, by its content; None for none."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # damaged, of a later version, names of no encoding
        return None
    if "archive_format" in names:
        return "pt2"
    return "torchscript" if "constants.pkl" in names and any(name.startswith("code/") for name in names) else None


def load_program(path: Path, *, device: str) -> Program:
    """Load a .pt2 or TorchScript file. ModelError for one that is neither, is damaged, or holds code to be run."""
    form = program_format(path)
    if form is None:
        raise ModelError(
            f"{path} is no network: neither a .safetensors file nor a program of torch.export (.pt2) or TorchScript; "
            "weights alone go through rddm features convert"
        )
    try:
        return _load_script(path, device) if form == "torchscript" else _load_exported(path, device)
    except ModelError:
        raise
    except Exception as error:  # PyTorch does not say what malformed files may raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(
            f"{path} cannot be loaded by PyTorch {torch.__version__} ({reason}); export it again"
        ) from error


def _load_exported(path: Path, device: str) -> Program:
    # Not torch.export.load: where this fails it logs a traceback, and tries the form of older versions.
    from torch.export.pt2_archive._package import load_pt2

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unable to execute the generated python", category=UserWarning)
        program = load_pt2(_checked_copy(path)).exported_programs["model"]
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    # The checks of guards are generated code, and say nothing that our checks of the outputs do not.
    return Program(program.module(check_guards=False), len(program.graph_signature.user_inputs))


def _load_script(path: Path, device: str) -> Program:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated", category=DeprecationWarning)
        module = torch.jit.load(path, map_location=device)
    module.eval()
    return Program(module, len(module.forward.schema.arguments) - 1)  # the first is the module itself


def _checked_copy(path: Path) -> io.BytesIO:
    """An archive of the graph and the raw tensors of this one, and of nothing else that may lie in it.

    Sample inputs, which are pickled, are left empty. ModelError for a graph or payloads that could run code.
    """
    from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

    buffer = io.BytesIO()
    with PT2ArchiveReader(str(path)) as reader, PT2ArchiveWriter(buffer) as writer:
        graph = _without_notes(json.loads(reader.read_bytes(MODEL)))
        _refuse_code(graph, source=f"{path}: {MODEL}")
        writer.write_string(MODEL, json.dumps(graph))
        writer.write_bytes(SAMPLE_INPUTS, b"")
        writer.write_bytes(VERSION, reader.read_bytes(VERSION))
        for folder, name in PAYLOADS.items():
            config = json.loads(reader.read_bytes(folder + name))
            _refuse_code(config, source=f"{path}: {folder}{name}")
            payloads = config["config"].values()
            if not all(
                entry["use_pickle"] is False and RAW_PAYLOAD.fullmatch(entry["path_name"]) for entry in payloads
            ):
                raise ModelError(f"{path}: {folder}{name} holds more than plain tensors, and code in it is not run")
            writer.write_string(folder + name, json.dumps(config))
            for place in sorted({folder + entry["path_name"] for entry in payloads}):
                writer.write_bytes(place, reader.read_bytes(place))
    buffer.seek(0)
    return buffer


def _without_notes(document: Any) -> Any:
    """The graph without what only debuggers read, such as stack traces, which may be any text."""
    if isinstance(document, dict):
        empty: dict[str, Any] = {"metadata": {}, "guards_code": []}
        return {name: empty.get(name, _without_notes(value)) for name, value in document.items()}
    return [_without_notes(value) for value in document] if isinstance(document, list) else document


def _refuse_code(document: Any, *, source: str) -> None:
    """Raise ModelError for text that would do something when PyTorch evaluates it or makes source of it."""
    for key, text in _texts(document):
        is_plain = _is_size(text) if key == "expr_str" else PLAIN_TEXT.fullmatch(text)
        if not is_plain:
            raise ModelError(f"{source} holds more than names and sizes ({text[:60]!r}), and code in it is not run")


def _texts(document: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of a JSON document, names included, each with the name it stands under."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield "", name
            yield from _texts(value, name)
    elif isinstance(document, list):
        for value in document:
            yield from _texts(value, key)
    elif isinstance(document, str):
        yield key, document


def _is_size(text: str) -> bool:
    """Whether an expression of sizes names nothing but symbols and arithmetic."""
    words = re.findall(r"\b[^\W\d]\w*", text)
    return bool(SIZE_TEXT.fullmatch(text)) and all(SIZE_WORD.fullmatch(word) for word in words)


def run_program(program: Program, *images: Tensor, source: str) -> Any:
    """What the program returns. ModelError where it cannot take these images, other than for want of memory."""
    try:
        return program.run(*images)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of whatever kind: the program is not ours
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{source} fails on images of shape {tuple(images[0].shape)} ({reason}); export it with a dynamic batch "
            "size, height and width, for float32 in [0, 255]"
        ) from error
