"""The DeepSpeed door: one network under ZeRO 0 to 3, seen as fp32 pieces of named parameters.

A `Piece` is a live fp32 view of a run of elements of one flattened parameter, with its optimizer moments. EMA and
checkpoints know only pieces, so they are the same for every stage. Where they come from:
  stage 0      every rank holds every parameter whole, the optimizer is plain torch;
  stages 1, 2  DeepSpeed's tensor-fragment mapping of the parameters this rank (partly) owns;
  stage 3      each rank holds ceil(numel / world) elements of every parameter, the last part padded.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from rddm_dist.comm import Topology
from rddm_dist.config import EngineSection, OptimSection
from rddm_dist.training.engine_keys import ZERO, check_further_keys
from rddm_dist.training.plan import BatchPlan
from rddm_dist.training.toolchain import check_toolchain

log = logging.getLogger(__name__)

LEFT_LOCK_S = 5.0
MOMENTS = ("exp_avg", "exp_avg_sq")
NOISE_NET = "unet1."
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BUCKET = 500_000_000
# What decides the next loss scales of DeepSpeed's dynamic scaler, besides its configuration.
SCALER_STATE: dict[str, type] = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int, "cur_hysteresis": int}


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened parameter, held by this rank.   weight, moments: (numel,) fp32"""

    name: str
    start: int
    weight: Tensor
    moments: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.weight.numel()


def deepspeed_config(
    engine: EngineSection, optim: OptimSection, plan: BatchPlan, *, parameters: int = MAX_BUCKET
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from ours, with what `engine.deepspeed` adds to it.   parameters: of the network"""
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": False,
        # Gradients are reduced in a buffer of this many elements, which stage 3 keeps; DeepSpeed's default is 2 GB.
        "reduce_bucket_size": min(parameters, MAX_BUCKET),
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.zero_stage == 3:
        # Small parameters stay partitioned, so that every rank holds its part of every parameter.
        zero["stage3_param_persistence_threshold"] = 0
    extra = dict(engine.deepspeed)
    zero.update(extra.pop(ZERO, {}))
    config: dict[str, Any] = {
        "train_batch_size": plan.rows_per_rank * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # Plain torch optimizer at stage 0: we clip there ourselves and so learn the norm.
        "gradient_clipping": optim.clip_norm if engine.zero_stage else 0.0,
        ZERO: zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if engine.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif engine.precision == "fp16":
        config["fp16"] = {"enabled": True}
    config.update(extra)
    return config


class Engine:
    """A network, its optimizer and their sharding. `net` is called like the network itself."""

    def __init__(
        self, net: nn.Module, *, engine: EngineSection, optim: OptimSection, plan: BatchPlan, topology: Topology
    ) -> None:
        on_gpu = topology.device.type == "cuda"
        check_engine(engine, on_gpu=on_gpu)
        if not on_gpu:
            build_operators()
        import deepspeed  # slow, and wants the environment prepared

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.stage = engine.zero_stage
        self.clip_norm = optim.clip_norm
        self.dtype = DTYPES[engine.precision]
        self.device = topology.device
        self.plan = plan
        net = net.to(self.device)
        self._shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        groups, self._lr_ratios = parameter_groups(net, optim)
        optimizer = OPTIMIZERS[optim.name](
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        parameters = sum(p.numel() for p in net.parameters())
        config = deepspeed_config(engine, optim, plan, parameters=parameters)
        chatter = io.StringIO()
        with contextlib.redirect_stdout(chatter):
            self.net, self._optimizer, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        log.info("DeepSpeed: %s", chatter.getvalue().strip() or "ready")
        if engine.compile:
            self.net.compile()
        self._parameters = dict(self.net.module.named_parameters())
        self._create_optimizer_states()
        self._grad_norm = float("nan")
        self.pieces: tuple[Piece, ...] = tuple(self._iter_pieces())

    def __call__(
        self,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        x_in: Tensor,
        mask: Tensor | None,
        x_self: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The network in the engine's number format, from and to float32."""
        return call_in(self.dtype, self.net, x_t, times, x_in, mask, x_self)

    # -- stepping ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        self.net.backward(loss)

    def next_micro_batch(self) -> None:
        """Between the micro-batches of a step: DeepSpeed counts them in its step(), which updates after the last."""
        assert not self.net.is_gradient_accumulation_boundary()
        self.net.step()

    def step(self, *, lr: float) -> None:
        """Optimizer step at an accumulation boundary, else only bookkeeping. Clips by the global norm before it.

        `lr` is that of optim.lr; parameters under optim.noise_lr take theirs in proportion.
        """
        if self.net.is_gradient_accumulation_boundary():
            for group, ratio in zip(self._optimizer.param_groups, self._lr_ratios, strict=True):
                group["lr"] = lr * ratio
            if self.stage == 0:
                limit = self.clip_norm or float("inf")
                norm = torch.nn.utils.clip_grad_norm_(self.net.module.parameters(), limit)
                self._grad_norm = float(norm)
        self.net.step()

    def grad_norm(self) -> float:
        """Global gradient norm before clipping of the last step. Read it on log steps only."""
        if self.stage == 0:
            return self._grad_norm
        return float(self.net.get_global_grad_norm() or 0.0)

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's loss scaler, None where there is none: stage 0, and bf16 at stage 1."""
        return getattr(self._optimizer, "loss_scaler", None)

    @property
    def loss_scaler(self) -> dict[str, float]:
        """State of the dynamic loss scale, the same on every rank; {} but for fp16. Set it to go on from there."""
        return read_loss_scaler(self._scaler)

    @loss_scaler.setter
    def loss_scaler(self, state: dict[str, float]) -> None:
        write_loss_scaler(self._scaler, state)

    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward; 1 but for fp16."""
        return float(self._scaler.cur_scale) if self._scaler else 1.0

    # -- state as pieces ---------------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in the order of the network."""
        return self._shapes

    @property
    def is_replicated(self) -> bool:
        """Every rank holds everything (stage 0): only rank 0 needs to write."""
        return self.stage == 0

    def _states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """(fp32 parameter, optimizer state) pairs the torch optimizer really steps on."""
        inner = self._inner_optimizer()
        if self.stage == 0:
            targets = list(self._parameters.values())
        elif self.stage == 3:
            targets = self._optimizer.fp32_partitioned_groups_flat
        elif hasattr(self._optimizer, "single_partition_of_fp32_groups"):
            targets = self._optimizer.single_partition_of_fp32_groups
        else:
            targets = self._optimizer.fp32_groups_flat_partition  # bf16 at stage 1
        for target in targets:
            yield target, inner.state[target]

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self.stage == 0 else self._optimizer.optimizer

    def _create_optimizer_states(self) -> None:
        """Give every parameter its Adam state now, as its first step would, so that pieces always have moments."""
        for target, state in self._states():
            state.clear()
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros_like(target, memory_format=torch.preserve_format)
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def optimizer_step(self) -> int:
        """Updates applied so far: Adam's step count."""
        for _, state in self._states():
            return int(state["step"])
        return 0

    @optimizer_step.setter
    def optimizer_step(self, value: int) -> None:
        for _, state in self._states():
            state["step"].fill_(float(value))

    def _iter_pieces(self) -> Iterator[Piece]:
        if self.stage == 0:
            states = {id(target): state for target, state in self._states()}
            for name, p in self._parameters.items():
                moments = {key: states[id(p)][key].detach().view(-1) for key in MOMENTS}
                yield Piece(name, 0, p.detach().view(-1), moments)
        elif self.stage == 3:
            yield from self._iter_stage3_pieces()
        else:
            for name, p in self._parameters.items():
                mapping = getattr(p, "_hp_mapping", None)
                if mapping is None:
                    continue
                moments = {key: mapping.get_optim_state_fragment(key).detach() for key in MOMENTS}
                start = mapping.lp_fragment_address.start
                yield Piece(name, start, mapping.get_hp_fragment().detach(), moments)

    def _iter_stage3_pieces(self) -> Iterator[Piece]:
        optimizer = self._optimizer
        rank, world = self.net.global_rank, self.net.world_size
        for name, p in self._parameters.items():
            group, offset, width = optimizer.grad_position[optimizer.get_param_id(p)]
            start = rank * -(-p.ds_numel // world)
            numel = max(0, min(width, p.ds_numel - start))
            if numel == 0:
                continue
            flat = optimizer.fp32_partitioned_groups_flat[group]
            state = optimizer.optimizer.state[flat]
            moments = {key: state[key].detach().narrow(0, offset, numel) for key in MOMENTS}
            yield Piece(name, start, flat.detach().narrow(0, offset, numel), moments)

    @torch.no_grad()
    def publish_weights(self) -> None:
        """After pieces were written: refresh what forward reads (low-precision and gathered copies) from them."""
        if self.stage == 3:
            for group in range(len(self._optimizer.fp32_partitioned_groups_flat)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        elif self.stage:
            self._optimizer.update_lp_params()
            if hasattr(self._optimizer, "_update_model_bit16_weights"):
                for group in range(len(self._optimizer.bit16_groups)):
                    self._optimizer._update_model_bit16_weights(group)

    def close(self) -> None:
        """Let DeepSpeed's hooks and buffers go."""
        self.net.destroy()


def call_in(
    dtype: torch.dtype,
    net: Callable[..., Sequence[Tensor]],
    x_t: Tensor,
    times: tuple[Tensor, Tensor],
    *images: Tensor | None,
) -> tuple[Tensor, ...]:
    """Call a network that computes in `dtype`, from and to float32.   images: x_in, mask, x_self"""
    first, *others = (None if image is None else image.to(dtype) for image in (x_t, *images))
    return tuple(output.float() for output in net(first, times, *others))


def parameter_groups(net: nn.Module, optim: OptimSection) -> tuple[list[dict[str, Any]], list[float]]:
    """The optimizer's groups, and the factor of each on optim.lr.

    One group, or with optim.noise_lr two, of which the second holds the second of two networks.
    """
    if not optim.noise_lr:
        return [{"params": list(net.parameters())}], [1.0]
    second = [p for name, p in net.named_parameters() if name.startswith(NOISE_NET)]
    first = [p for name, p in net.named_parameters() if not name.startswith(NOISE_NET)]
    return [{"params": first}, {"params": second}], [1.0, optim.noise_lr / optim.lr]


def check_engine(engine: EngineSection, *, on_gpu: bool) -> None:
    """Refuse what cannot work, before anything is allocated."""
    check_further_keys(engine.deepspeed)
    if engine.precision == "fp16" and not on_gpu:
        raise ConfigError("engine.precision=fp16 needs a GPU; use fp32 or bf16 here")
    if engine.precision != "fp32" and engine.zero_stage == 0:
        raise ConfigError(
            f"engine.zero_stage=0 trains in fp32 only, not {engine.precision}; set engine.zero_stage=1, which keeps "
            "the fp32 weights DeepSpeed's stage 0 does without"
        )
    if engine.offload_optimizer and engine.zero_stage == 0:
        raise ConfigError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")


def read_loss_scaler(scaler: Any) -> dict[str, float]:
    """What decides the future of a loss scaler of DeepSpeed's; {} for None and for one whose scale is fixed."""
    if scaler is None or not scaler.dynamic:
        return {}
    return {key: float(getattr(scaler, key)) for key in SCALER_STATE}


def write_loss_scaler(scaler: Any, state: dict[str, float]) -> None:
    """Go on as the scaler that `state` was read from. Nothing is done where either of them has no state."""
    if state and read_loss_scaler(scaler):
        for key, kind in SCALER_STATE.items():
            setattr(scaler, key, kind(state[key]))


def build_operators() -> None:
    """Compile, or load, the operator DeepSpeed uses on CPUs; one process at a time.

    torch guards a build with a plain lock file, which a killed build leaves behind: every later process would wait for
    it for ever, without a word. The kernel's lock around it tells a left one from one in use.
    """
    check_toolchain()
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(ShareMemCommBuilder().name, False))
    chatter = io.StringIO()
    with open(folder.parent / ".rddm-build.lock", "w") as guard, contextlib.redirect_stdout(chatter):
        fcntl.flock(guard, fcntl.LOCK_EX)
        _drop_left_lock(folder / "lock")
        build_shm_op()
    log.info("DeepSpeed's operator: %s", chatter.getvalue().strip())


def _drop_left_lock(lock: Path) -> None:
    """Remove torch's lock file unless someone who only loads, which takes no time, holds it right now."""
    while lock.exists():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > LEFT_LOCK_S:
                log.warning("removing %s, left by a build that was killed", lock)
                lock.unlink()
        time.sleep(0.1)
