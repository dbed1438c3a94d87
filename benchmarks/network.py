"""Speed of the U-Net, against a straightforward implementation of the same mathematics.

    python benchmarks/network.py                # a few minutes on 2 cores
    python benchmarks/network.py --only "sampling 64"
    python benchmarks/network.py --dim 16 --rounds 3 --no-compile

`eager` is written from the definitions, operation by operation: filters standardised in every call, attention as
einsum, normalisations from their means and variances. It shares its weights with the network it is compared with, and
before anything is timed their outputs must agree to 1e-5 of the largest output.

    training     forward, L1 loss, backward and Adam's step of batch 1 at 64 pixels; `rddm` is the network as trained
    sampling 64  a run of 5 calls without gradients; `rddm` folds the network first, in every run
    sampling 256 one call; `rddm` is folded, `compiled` is folded and compiled before, warm-up left out

A round times every arm once, in an order that turns from round to round. Tables have medians over the rounds
(least-most); ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from support.report import (
    Report,
    make_parser,
    print_noise,
    print_table,
    require_positive,
    run_main,
    show_summary,
    summarize,
)
from torch import Tensor

from data_pipeline.errors import ConfigError
from rddm_dist.cli.progress import ProgressBar
from rddm_dist.model.folding import compiled, folded
from rddm_dist.model.unet import Unet

SEED = 0
TOLERANCE = 1e-5
EAGER, RDDM, COMPILED = "eager", "rddm", "rddm, compiled"
CHANNELS = 6  # x_t and x_in
SECTIONS = ("training", "sampling 64", "sampling 256")
# How many times as fast as eager an arm must be.
BARS = {("training", RDDM): 1.1, ("sampling 64", RDDM): 1.5, ("sampling 256", COMPILED): 1.15}

Arm = Callable[[], Any]


@dataclass(frozen=True)
class Eager:
    """The U-Net of `weights`, a state dict; called with x: (B, C, H, W) and t: (B,) float32 it gives (B, 3, H, W)."""

    weights: Mapping[str, Tensor]
    num_levels: int

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        time = self._time(t)
        x = first = self._conv("init_conv", x, padding=3)
        skips = []
        for i in range(self.num_levels):
            x = self._res_block(f"downs.{i}.0", x, time)
            skips.append(x)
            x = self._res_block(f"downs.{i}.1", x, time)
            x = x + self._linear_attention(f"downs.{i}.2.fn", x)
            skips.append(x)
            is_last = i == self.num_levels - 1
            x = self._conv(f"downs.{i}.3", x, stride=1 if is_last else 2, padding=1)
        x = self._res_block("mid_block1", x, time)
        x = x + self._attention("mid_attn.fn", x)
        x = self._res_block("mid_block2", x, time)
        for i in range(self.num_levels):
            x = self._res_block(f"ups.{i}.0", torch.cat([x, skips.pop()], dim=1), time)
            x = self._res_block(f"ups.{i}.1", torch.cat([x, skips.pop()], dim=1), time)
            x = x + self._linear_attention(f"ups.{i}.2.fn", x)
            if i < self.num_levels - 1:
                x = self._conv(f"ups.{i}.3.1", F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
            else:
                x = self._conv(f"ups.{i}.3", x, padding=1)
        x = self._res_block("final_res_block", torch.cat([x, first], dim=1), time)
        return self._conv("final_conv", x)

    def _conv(self, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), stride, padding)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _time(self, t: Tensor) -> Tensor:
        half = self.weights["time_mlp.1.weight"].shape[1] // 2
        angles = t[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self._linear("time_mlp.3", F.gelu(self._linear("time_mlp.1", features)))

    def _block(self, name: str, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        weight = self.weights[f"{name}.proj.weight"]
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
        x = F.conv2d(x, (weight - mean) * (variance + 1e-5).rsqrt(), self.weights[f"{name}.proj.bias"], padding=1)
        x = F.group_norm(x, 8, self.weights[f"{name}.norm.weight"], self.weights[f"{name}.norm.bias"])
        if scale_shift is not None:
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return F.silu(x)

    def _res_block(self, name: str, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self._linear(f"{name}.mlp.1", F.silu(time))[:, :, None, None].chunk(2, dim=1)
        y = self._block(f"{name}.block2", self._block(f"{name}.block1", x, (scale, shift)))
        has_projection = f"{name}.res_conv.weight" in self.weights
        return y + (self._conv(f"{name}.res_conv", x) if has_projection else x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        variance = x.var(dim=1, unbiased=False, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.weights[f"{name}.g"]

    def _heads(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (B, 4, 32, HW) each."""
        qkv = self._conv(f"{name}.fn.to_qkv", self._norm(f"{name}.norm", x))
        q, k, v = qkv.reshape(len(x), 3, 4, 32, -1).unbind(1)
        return q, k, v

    def _linear_attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self._heads(name, x)
        q, k, v = q.softmax(dim=2) * 32**-0.5, k.softmax(dim=3), v / v.shape[3]
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q).reshape(len(x), 128, *x.shape[2:])
        return self._norm(f"{name}.fn.to_out.1", self._conv(f"{name}.fn.to_out.0", out))

    def _attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self._heads(name, x)
        weights = torch.einsum("bhdi,bhdj->bhij", q * 32**-0.5, k).softmax(dim=3)
        out = torch.einsum("bhij,bhdj->bhid", weights, v)  # (B, 4, HW, 32)
        return self._conv(f"{name}.fn.to_out", out.transpose(2, 3).reshape(len(x), 128, *x.shape[2:]))


def make_pair(dim: int) -> tuple[Unet, Eager]:
    """The network and its counterpart over the same weights."""
    torch.manual_seed(SEED)
    net = Unet(dim, in_channels=CHANNELS)
    return net, Eager(dict(net.named_parameters()), len(net.downs))


def make_batch(size: int) -> tuple[Tensor, Tensor]:
    """x: (1, CHANNELS, size, size), t: (1,) float32."""
    return torch.randn(1, CHANNELS, size, size, generator=torch.Generator().manual_seed(SEED)), torch.tensor([500.0])


def training_step(net: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer, size: int) -> Arm:
    """Forward, backward and update; with a learning rate of 0, so that every round computes the same."""
    x, t = make_batch(size)

    def step() -> None:
        (net(x, t) - x[:, :3]).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_run(prepare: Callable[[], Callable[[Tensor, Tensor], Tensor]], size: int, calls: int) -> Arm:
    """`calls` evaluations without gradients of what `prepare` gives, each fed from the one before."""
    x, t = make_batch(size)

    def run() -> Tensor:
        with torch.inference_mode():
            net, state = prepare(), x
            for _ in range(calls):
                output = net(state, t)
                state = torch.cat([state[:, :3] - output / calls, state[:, 3:]], dim=1)
            return state

    return run


def make_arms(section: str, dim: int, *, compile: bool) -> dict[str, Arm]:
    """The arms of a section; those that sample have been checked against each other."""
    net, eager = make_pair(dim)
    if section == "training":
        optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
        arms = {EAGER: training_step(eager, optimizer, 64), RDDM: training_step(net, optimizer, 64)}
        with torch.inference_mode():
            check_close(eager(*make_batch(64)), net(*make_batch(64)), RDDM)
        return arms
    if section == "sampling 64":
        arms = {EAGER: sampling_run(lambda: eager, 64, 5), RDDM: sampling_run(lambda: folded(net), 64, 5)}
    else:
        fast = folded(net)
        arms = {EAGER: sampling_run(lambda: eager, 256, 1), RDDM: sampling_run(lambda: fast, 256, 1)}
        if compile:
            fastest = compiled(folded(net))
            arms[COMPILED] = sampling_run(lambda: fastest, 256, 1)
    expected = arms[EAGER]()
    for name, arm in arms.items():
        check_close(expected, arm(), name)
    return arms


def check_close(expected: Tensor, output: Tensor, name: str) -> None:
    """Stop where an arm computes something else."""
    error = float((output - expected).abs().max() / expected.abs().max())
    print(f"{name}: largest difference from eager {error:.1e} of the largest value", flush=True)
    if not error < TOLERANCE:
        raise ConfigError(f"{name} differs from eager by {error:.1e}, allowed is {TOLERANCE:.0e}: nothing to compare")


def measure(arms: Mapping[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Arm -> seconds, one for each round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    with ProgressBar("network", rounds + 1, every_s=5.0) as bar:
        for number in range(rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                started = perf_counter()
                arms[name]()
                if number:
                    seconds[name].append(perf_counter() - started)
            bar.update(number + 1)
    return seconds


def tabulate(section: str, seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """One row for each arm: seconds and the ratio to eager, with its bar."""
    rows = []
    for name, values in seconds.items():
        ratios = [base / value for base, value in zip(seconds[EAGER], values, strict=True)]
        rows.append(
            {
                "section": section,
                "arm": name,
                "seconds": summarize(values),
                "times_as_fast": summarize(ratios),
                "bar": BARS.get((section, name)),
            }
        )
    return rows


def show_row(row: Mapping[str, Any]) -> list[str]:
    bar = "" if row["bar"] is None else f"{row['bar']}"
    if bar:
        bar += ": met" if row["times_as_fast"]["median"] >= row["bar"] else ": NOT met"
    return [row["section"], row["arm"], show_summary(row["seconds"], 3), show_summary(row["times_as_fast"], 2), bar]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "network")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section (all)")
    parser.add_argument("--dim", type=int, default=64, help="width of the network (64)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of each section (10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads (all cores)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what has to be compiled first")
    options = parser.parse_args()
    require_positive(parser, options, ("dim", "rounds", "threads"))
    return options


def main() -> None:
    options = parse_arguments()
    report = Report("network", ("torch",))
    torch.set_num_threads(options.threads)
    rows = []
    for section in options.only or SECTIONS:
        arms = make_arms(section, options.dim, compile=not options.no_compile)
        rows += tabulate(section, measure(arms, options.rounds))
        print_noise(f"{EAGER} of {section}", rows[-len(arms)]["seconds"])
    print_table(("section", "arm", "seconds", "times as fast", "bar"), map(show_row, rows))
    settings = {"dim": options.dim, "rounds": options.rounds, "threads": options.threads}
    report.write(options.json, settings=settings, results=rows)


if __name__ == "__main__":
    run_main(main)
