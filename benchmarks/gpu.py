"""Speed, memory and utilisation of the network on a GPU; needs neither a dataset nor ray, mlflow or deepspeed.

    python benchmarks/gpu.py                              # everything: about half an hour, most of it compiling
    python benchmarks/gpu.py --sizes 256 --dims 64 --modes bf16 "bf16, channels last"
    python benchmarks/gpu.py --smoke                      # the same code on a CPU with tiny networks

One U-Net of condition input. `sampling` is a call without gradients, `training` forward, L1 loss and backward without
the optimizer. The modes, each with what the one before it has from bf16 on:

    fp32                the network as it is trained, no tensor cores
    tf32                with tensor cores for float32
    bf16                weights and activations in bfloat16
    ..., channels last  convolutions channels last; sampling also has its filters folded
    ..., compiled       by torch.compile, warm-up left out
    ..., CUDA graph     sampling only: the calls of `channels last` captured once and replayed, not compiled

FLOPs are counted by torch for the network as written, two for a multiplication with addition. Utilisation is FLOPs over
time over the data sheet's peak of that number format without sparsity, where the card is known. Times are medians.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from support.report import Report, make_parser, print_table, require_positive, run_main
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import EnvironmentFault
from rddm_dist.model.folding import folded
from rddm_dist.model.net import build_net

WARM_UP = 3
DIM_MULTS = (1, 2, 4, 8)
TASKS = ("sampling", "training")

# Part of a card's name, the most specific first -> 10^12 FLOP/s of float32, TF32 and bfloat16, dense.
PEAKS = {
    "H100 PCIe": (51.0, 378.0, 756.0),
    "H100": (67.0, 494.5, 989.0),
    "H200": (67.0, 494.5, 989.0),
    "A100": (19.5, 156.0, 312.0),
    "L40S": (91.6, 183.0, 362.0),
}


@dataclass(frozen=True)
class Mode:
    """How the network is run; `peak` is the column of PEAKS."""

    name: str
    peak: int
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    compiled: bool = False
    graph: bool = False


MODES = (
    Mode("fp32", 0, torch.float32, channels_last=False),
    Mode("tf32", 1, torch.float32, channels_last=False),
    Mode("bf16", 2, channels_last=False),
    Mode("bf16, channels last", 2),
    Mode("bf16, channels last, compiled", 2, compiled=True),
    Mode("bf16, channels last, CUDA graph", 2, graph=True),
)


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share; `backend` is torch.compile's."""

    device: torch.device
    batch: int
    repeats: int
    backend: str
    dim_mults: tuple[int, ...]


def make_inputs(size: int, batch: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """x_t and x_in: (batch, 3, size, size), times: 2 x (batch,)."""
    x_t, x_in = torch.randn(2, batch, 3, size, size, device=device).unbind(0)
    times = torch.linspace(0.0, 999.0, batch, device=device)
    return x_t, (times, times), x_in


def count_flops(task: str, dim: int, size: int, dim_mults: tuple[int, ...] = DIM_MULTS) -> int:
    """FLOPs of one image, counted without computing anything."""
    device = torch.device("meta")
    with device:
        net = build_net(dim=dim, dim_mults=dim_mults, num_nets=1)
    with FlopCounterMode(display=False) as counter:
        make_call(task, net, make_inputs(size, 1, device))()
    return counter.get_total_flops()


def make_call(task: str, net: nn.Module, inputs: tuple[Tensor, tuple[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    """One unit of work; a training step leaves its gradients to be overwritten by the next."""
    target = inputs[2]

    def sampling() -> Tensor:
        with torch.no_grad():
            return net(*inputs)[0]

    def training() -> None:
        net.zero_grad(set_to_none=True)
        (net(*inputs)[0].float() - target).abs().mean().backward()

    return sampling if task == "sampling" else training


def prepare(task: str, mode: Mode, dim: int, size: int, setting: Setting) -> Callable[[], Any]:
    """The work of a row, ready to be repeated."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode.peak == 1
    torch.manual_seed(0)
    with setting.device:
        net: nn.Module = build_net(dim=dim, dim_mults=setting.dim_mults, num_nets=1)
    inputs = make_inputs(size, setting.batch, setting.device)
    if mode.channels_last:
        net = folded(net) if task == "sampling" else net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = net.to(mode.dtype)
    if mode.compiled:
        net.compile(backend=setting.backend)
    call = make_call(task, net, inputs)
    return captured(call) if mode.graph and setting.device.type == "cuda" else call


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` as a CUDA graph that is replayed; it always works on the same tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(call: Callable[[], Any], setting: Setting) -> tuple[float, float]:
    """Median seconds of a call, and the most 10^9 bytes it had allocated on the GPU."""
    on_gpu = setting.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(WARM_UP):
        call()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(setting.repeats):
        synchronize()
        started = perf_counter()
        call()
        synchronize()
        seconds.append(perf_counter() - started)
    return median(seconds), torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0


def run_row(task: str, mode: Mode, dim: int, size: int, setting: Setting, peaks: tuple[float, ...]) -> dict[str, Any]:
    """One row; where memory runs out, its figures are missing."""
    row: dict[str, Any] = {"task": task, "dim": dim, "size": size, "mode": mode.name}
    try:
        seconds, memory = measure(prepare(task, mode, dim, size, setting), setting)
    except torch.OutOfMemoryError:
        return {**row, "fits": False}
    tflops = count_flops(task, dim, size, setting.dim_mults) * setting.batch / seconds / 1e12
    row |= {"fits": True, "seconds": seconds, "images_per_s": setting.batch / seconds, "peak_gb": memory}
    return {**row, "tflop_per_s": tflops, "utilisation": tflops / peaks[mode.peak] if peaks else None}


def show_row(row: dict[str, Any]) -> list[str]:
    if not row["fits"]:
        figures = ["", "out of memory", "", ""]
    else:
        part = "" if row["utilisation"] is None else f"{100 * row['utilisation']:.1f} %"
        figures = [f"{row['images_per_s']:.1f}", f"{row['peak_gb']:.2f}", f"{row['tflop_per_s']:.2f}", part]
    return [row["task"], str(row["dim"]), str(row["size"]), row["mode"], *figures]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "gpu")
    names = [mode.name for mode in MODES]
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="image sides (64 128 256)")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="widths of the network (64 128)")
    parser.add_argument("--modes", nargs="+", choices=names, default=names, metavar="MODE", help="only these modes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only these tasks")
    parser.add_argument("--batch", type=int, default=16, help="images of a call (16)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of a row (20)")
    parser.add_argument("--smoke", action="store_true", help="on the CPU: one level, width 8, 16 pixels, two images")
    options = parser.parse_args()
    require_positive(parser, options, ("batch", "repeats"))
    if options.smoke:
        options.sizes, options.dims, options.batch, options.repeats = [16], [8], 2, 1
    return options


def main() -> None:
    options = parse_arguments()
    if not options.smoke and not torch.cuda.is_available():
        raise EnvironmentFault("this machine has no CUDA GPU that torch can use; --smoke runs the same code on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda")
    card = "CPU" if options.smoke else torch.cuda.get_device_name()
    peaks = next((peak for name, peak in PEAKS.items() if name in card), ())
    setting = Setting(
        device,
        options.batch,
        options.repeats,
        backend="eager" if options.smoke else "inductor",
        dim_mults=DIM_MULTS[:1] if options.smoke else DIM_MULTS,
    )
    report = Report("gpu", ("torch",))
    print(f"{card}, torch {torch.__version__}, batch {setting.batch}", flush=True)
    rows = []
    for dim, size, task, mode in itertools.product(options.dims, options.sizes, options.tasks, MODES):
        if mode.name in options.modes and not (mode.graph and task == "training"):
            rows.append(run_row(task, mode, dim, size, setting, peaks))
            torch.compiler.reset()
    print_table(("task", "dim", "size", "mode", "images/s", "peak GB", "TFLOP/s", "utilisation"), map(show_row, rows))
    settings = {"card": card, "batch": setting.batch, "repeats": setting.repeats}
    report.write(options.json, settings=settings, results=rows)


if __name__ == "__main__":
    run_main(main)
