"""The sections of the run configuration: every key with its type, default, range, class and meaning.

Every key has one of three classes, which decide what a continued run may change:
  identity    what the run computes (data, method, network, batch, seed, optimizer): a difference is an error;
  extendable  how far and how often (steps, intervals, where the same data lies): a difference is logged;
  execution   how the hardware does it (ZeRO stage, precision, micro-batch, threads): free.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

IDENTITY, EXTENDABLE, EXECUTION = "identity", "extendable", "execution"
MAX_LENGTH = 12**-0.5  # of a power-function average of exponent 0, which weighs all steps alike
DecayRate = Annotated[float, Field(ge=0, lt=1)]
PathName = Literal["simultaneous", "residual_first", "noise_first", "two_pass"]


def _key(default: Any, key_class: str, description: str, **constraints: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"class": key_class}, **constraints)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    name: str = _key("", EXECUTION, "Name of the run folder; empty: the config file's name")
    storage: str = _key("runs", EXECUTION, "Folder, or s3:// URL, that holds the run folders; a folder also mlflow.db")
    work_dir: str = _key(
        "", EXECUTION, "With a URL in run.storage: local folder for journal and logs; empty: the system's temporary one"
    )


class PreprocessSection(Section):
    pad_to: int = _key(0, IDENTITY, "Least side in pixels, padded with zeros at the bottom and the right", ge=0)
    pad_multiple: int = _key(0, IDENTITY, "Sides become multiples of it, padded likewise; 0: off", ge=0)
    equalize: bool = _key(False, IDENTITY, "Equalise the histogram of each channel of the input")
    resize: int = _key(0, IDENTITY, "Side of the square every image is resized to (bicubic); 0: off", ge=0)


class DataSection(Section):
    uri: str | tuple[str, ...] = _key("", EXTENDABLE, "Packed dataset to train on (holds manifest.json), or several")
    weights: tuple[Annotated[float, Field(gt=0)], ...] = _key(
        (), IDENTITY, "Share of each of several datasets in every batch; empty: by their sizes"
    )
    eval_uri: str = _key("", EXTENDABLE, "Packed dataset for previews during training; empty: the training data")
    crop: int | dict[int, int] = _key(
        0, IDENTITY, "Side of the random square crop in pixels, 0: whole images of one size; or {first step: side}"
    )
    flip: bool = _key(True, IDENTITY, "Mirror a sample left-right with probability one half")
    rotate: bool = _key(
        False, IDENTITY, "Turn a sample by 0, 90, 180 or 270 degrees, each with probability one quarter"
    )
    degrade: str = _key("", IDENTITY, "Make inputs from targets while training, e.g. noise(sigma=25)+jpeg(quality=40)")
    preprocess: PreprocessSection = PreprocessSection()
    lanes: int = _key(0, IDENTITY, "Shards read in parallel per epoch; divides train.global_batch; 0: chosen", ge=0)
    threads: int = _key(2, EXECUTION, "Decoding threads per worker", ge=1, le=64)
    prefetch_batches: int = _key(4, EXECUTION, "Batches decoded ahead", ge=1, le=64)
    prefetch_mb: int = _key(1024, EXECUTION, "Megabytes of images read and decoded ahead, at most", ge=1)
    cache_gb: float = _key(0.0, EXECUTION, "Node-local cache of whole shards, in 10^9 bytes; 0: range reads", ge=0)
    cache_dir: str = _key("", EXECUTION, "Folder of that cache on a local disk; empty: the system's temporary folder")
    read_deadline_s: float = _key(120.0, EXECUTION, "How long reads from a remote dataset are tried again", gt=0)
    bad_sample_budget: float = _key(
        0.01, EXTENDABLE, "Part of the samples that may turn out unreadable before the run stops", ge=0, le=1
    )

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.weights and len(self.weights) != len(self.uris):
            raise ValueError(
                f"data.weights has {len(self.weights)} values for the {len(self.uris)} dataset(s) of data.uri; give "
                "one each"
            )
        schedule = self.crop_schedule
        if 0 not in schedule or min(schedule) < 0 or min(schedule.values()) < 0:
            raise ValueError(f"data.crop={self.crop} must map first steps to sides in pixels, from step 0 on")
        return self

    @property
    def uris(self) -> tuple[str, ...]:
        """The training datasets."""
        given = (self.uri,) if isinstance(self.uri, str) else self.uri
        return tuple(uri for uri in given if uri)

    @property
    def crop_schedule(self) -> dict[int, int]:
        """First step -> side of the crop."""
        return self.crop if isinstance(self.crop, dict) else {0: self.crop}


class ScheduleSection(Section):
    kind: Literal["linear", "power", "ddim"] = _key("linear", IDENTITY, "Coefficient family (spec of RDDM, eq. 13)")
    alpha_kind: Literal["same", "linear", "power", "ddim"] = _key("same", IDENTITY, "Family of alpha; same: kind")
    beta2_kind: Literal["same", "linear", "power", "ddim"] = _key("same", IDENTITY, "Family of beta^2; same: kind")
    alpha: Literal["decreased", "increased", "average", "normal"] = _key("decreased", IDENTITY, "Shape of alpha")
    beta2: Literal["decreased", "increased", "average", "normal"] = _key("increased", IDENTITY, "Shape of beta^2")
    alpha_power: float = _key(1.0, IDENTITY, "Exponent of alpha in the power family", ge=0)
    beta2_power: float = _key(1.0, IDENTITY, "Exponent of beta^2 in the power family", ge=0)
    betas: Literal["linear", "scaled_linear", "squaredcos"] = _key("linear", IDENTITY, "DDPM betas of kind ddim")


class DiffusionSection(Section):
    objective: Literal[
        "pred_res_noise",
        "pred_res_add_noise",
        "pred_x0_noise",
        "pred_x0_add_noise",
        "pred_noise",
        "pred_res",
        "pred_x0",
        "pred_v",
        "auto",
    ] = _key(
        "pred_res_noise",
        IDENTITY,
        "What the network predicts; pred_v goes with process ddpm; auto: a search finds pred_res or pred_noise",
    )
    process: Literal["rddm", "ddpm"] = _key(
        "rddm",
        IDENTITY,
        "ddpm: the baseline, a diffusion of the image alone that only the network's condition restores",
    )
    generate: bool = _key(
        False, IDENTITY, "Make images from noise alone: the degraded image is 0 and of the data only targets are read"
    )
    loss: Literal["l1", "l2"] = _key("l1", IDENTITY, "Distance between prediction and target")
    num_timesteps: int = _key(1000, IDENTITY, "Timesteps T of the forward process", ge=1, le=100_000)
    schedule: ScheduleSection = ScheduleSection()
    sum_scale: float = _key(1.0, IDENTITY, "Final noise variance beta_cumsum[T]^2", gt=0)
    residual_clip: tuple[float, float] = _key(
        (-2.0, 2.0), IDENTITY, "Range predicted residuals are clamped to in sampling; the authors use [-1, 1]"
    )
    parity: Literal["clean", "official"] = _key("clean", IDENTITY, "official: the authors' corner cases")
    time_input: Literal["index", "clocks"] = _key("index", IDENTITY, "Time fed to the network")


class ModelSection(Section):
    kind: Literal["unet", "shared_encoder"] = _key("unet", IDENTITY, "shared_encoder: one encoder, two decoders")
    dim: int = _key(64, IDENTITY, "Base width, a multiple of 8", ge=8)
    dim_mults: tuple[Annotated[int, Field(ge=1)], ...] = _key(
        (1, 2, 4, 8), IDENTITY, "Width of each level as a multiple of dim", min_length=1
    )
    num_nets: int = _key(2, IDENTITY, "U-Nets: 2 for objectives with two outputs, 1 for one", ge=1, le=2)
    condition: Literal["none", "input", "input_mask"] = _key("input", IDENTITY, "What the network sees besides x_t")
    self_condition: bool = _key(False, IDENTITY, "Show the network its own last estimate of x0")

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if self.dim % 8:
            raise ValueError(f"model.dim={self.dim} must be a multiple of 8")
        return self


class OptimSection(Section):
    name: Literal["adam", "adamw", "radam"] = _key("adam", IDENTITY, "Optimizer")
    lr: float = _key(8e-5, IDENTITY, "Peak learning rate", gt=0)
    noise_lr: float = _key(
        0.0, IDENTITY, "Peak learning rate of the second of two networks, in an optimizer group of its own; 0: lr", ge=0
    )
    betas: tuple[DecayRate, DecayRate] = _key((0.9, 0.99), IDENTITY, "Adam's decay rates")
    eps: float = _key(1e-8, IDENTITY, "Adam's epsilon", gt=0)
    weight_decay: float = _key(0.0, IDENTITY, "Weight decay", ge=0)
    clip_norm: float = _key(1.0, IDENTITY, "Global gradient-norm clip; 0: off", ge=0)
    warmup_steps: int = _key(0, IDENTITY, "Linear warm-up from 0", ge=0)
    schedule: Literal["constant", "cosine"] = _key("constant", IDENTITY, "Learning rate after the warm-up")
    decay_steps: int = _key(0, IDENTITY, "Step at which cosine reaches min_lr_ratio", ge=0)
    min_lr_ratio: float = _key(0.0, IDENTITY, "Final learning rate of cosine, as a part of lr", ge=0, le=1)


class TrainSection(Section):
    steps: int = _key(100_000, EXTENDABLE, "Optimizer steps of the whole run", ge=1)
    global_batch: int = _key(16, IDENTITY, "Samples per optimizer step over all workers", ge=1)
    micro_batch: int = _key(0, EXECUTION, "Samples per forward on one worker; 0: all of its share", ge=0)
    seed: int = _key(0, IDENTITY, "Seed of order, crops, timesteps, noise and initial weights", ge=0)
    init_from: str = _key("", EXTENDABLE, "MODEL whose weights a new run starts from; empty: drawn ones")
    log_every: int = _key(10, EXTENDABLE, "Steps between log points", ge=1)
    checkpoint_every: int = _key(1000, EXTENDABLE, "Steps between checkpoints", ge=1)
    keep_last: int = _key(2, EXTENDABLE, "Newest checkpoints kept", ge=2)
    keep_every: int = _key(0, EXTENDABLE, "Checkpoints of every so many steps are kept for good; 0: none", ge=0)
    keep_best: int = _key(0, EXTENDABLE, "Checkpoints kept for the best values of best_metric; 0: none", ge=0)
    best_metric: Literal["preview/psnr", "train/loss"] = _key("preview/psnr", EXTENDABLE, "What keep_best goes by")
    max_failed_saves: int = _key(
        5, EXTENDABLE, "Saves in a row that may fail (disk full, storage away) before the run ends", ge=1
    )
    max_hours: float = _key(0.0, EXECUTION, "Save and stop (exit 75) after so many hours of one start; 0: never", ge=0)
    notice_file: str = _key(
        "", EXECUTION, "Save and stop when this file appears on a worker's machine (the notice of a spot instance)"
    )


class EmaSection(Section):
    decay: float = _key(0.995, IDENTITY, "Largest decay per update", ge=0, lt=1)
    update_every: int = _key(10, IDENTITY, "Optimizer steps between updates", ge=1)
    start_step: int = _key(100, IDENTITY, "Updates up to this step copy the weights", ge=0)
    power: float = _key(2 / 3, IDENTITY, "Exponent of the warm-up 1 - (1 + n)^-power", gt=0)
    lengths: tuple[Annotated[float, Field(gt=0, lt=MAX_LENGTH)], ...] = _key(
        (), IDENTITY, "Relative lengths of further, power-function averages, e.g. [0.05, 0.1]"
    )
    snapshot_every: int = _key(
        0, EXTENDABLE, "Steps between snapshots of those, from which averages of other lengths are made; 0: none", ge=0
    )

    @model_validator(mode="after")
    def _check(self) -> EmaSection:
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"ema.lengths={list(self.lengths)} names a length twice; give each once")
        if self.snapshot_every and not self.lengths:
            raise ValueError(
                f"ema.snapshot_every={self.snapshot_every} has nothing to keep; set ema.lengths, e.g. [0.05, 0.1]"
            )
        return self


class SampleScheduleSection(Section):
    """Coefficients that replace those of training while sampling; `same` keeps them."""

    alpha_kind: Literal["same", "linear", "power", "ddim"] = _key("same", EXTENDABLE, "Family of alpha")
    beta2_kind: Literal["same", "linear", "power", "ddim"] = _key("same", EXTENDABLE, "Family of beta^2")
    alpha: Literal["decreased", "increased", "average", "normal"] = _key("decreased", EXTENDABLE, "Shape of alpha")
    beta2: Literal["decreased", "increased", "average", "normal"] = _key("increased", EXTENDABLE, "Shape of beta^2")
    alpha_power: float = _key(1.0, EXTENDABLE, "Exponent of alpha in the power family", ge=0)
    beta2_power: float = _key(1.0, EXTENDABLE, "Exponent of beta^2 in the power family", ge=0)
    betas: Literal["linear", "scaled_linear", "squaredcos"] = _key("linear", EXTENDABLE, "DDPM betas of kind ddim")
    keeps_estimate: bool = _key(
        False, EXTENDABLE, "Noise-only prediction goes on with the alpha of training: only the speed changes"
    )

    @model_validator(mode="after")
    def _check(self) -> SampleScheduleSection:
        for name in ("alpha", "beta2"):
            if getattr(self, f"{name}_kind") != "same":
                continue
            for key in (name, f"{name}_power"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"sample.schedule.{key}={getattr(self, key)} has no effect with {name}_kind=same; set "
                        f"sample.schedule.{name}_kind to linear, power or ddim"
                    )
        if self.keeps_estimate and self.alpha_kind == "same":
            raise ValueError(
                "sample.schedule.keeps_estimate=true has no effect with alpha_kind=same; set "
                "sample.schedule.alpha_kind to linear, power or ddim"
            )
        if self.betas != "linear" and "ddim" not in (self.alpha_kind, self.beta2_kind):
            raise ValueError(
                f"sample.schedule.betas={self.betas} has no effect without kind ddim; set sample.schedule.alpha_kind "
                "or beta2_kind to ddim"
            )
        return self


class SampleSection(Section):
    steps: int = _key(5, EXTENDABLE, "Sampling steps of previews, and the default of evaluate and restore", ge=1)
    update: Literal["pred_noise", "x0", "eta0", "eta1"] = _key("pred_noise", EXTENDABLE, "Update rule of the sampler")
    path: PathName | tuple[tuple[float, float], ...] = _key(
        "simultaneous", EXTENDABLE, "What is removed first, or a list of [alpha_cumsum, beta_cumsum] down to [0, 0]"
    )
    use: Literal["all", "residual", "noise", "x0"] = _key("all", EXTENDABLE, "The output of two that is used alone")
    eta: float = _key(0.0, EXTENDABLE, "Stochasticity of the sampler; 0: deterministic", ge=0, le=1)
    schedule: SampleScheduleSection = SampleScheduleSection()
    every: int = _key(1000, EXTENDABLE, "Training steps between previews (grid and PSNR); 0: none", ge=0)
    images: int = _key(4, EXTENDABLE, "Images in a preview", ge=1, le=64)
    size: int = _key(128, EXTENDABLE, "Preview images are cut to this side in their centre, in pixels", ge=8)

    @field_validator("path", mode="before")
    @classmethod
    def _check_path(cls, value: Any) -> Any:
        """Before the type is checked, which would tell of one of the two forms only."""
        names = get_args(PathName)
        if not isinstance(value, (list, tuple)):
            if value not in names:
                raise ValueError(
                    f"sample.path={value} is not known; choose one of {', '.join(names)} or give its vertices, a list "
                    "of [alpha_cumsum, beta_cumsum]"
                )
            return value
        for vertex in value:
            if not _is_vertex(vertex):
                raise ValueError(
                    f"sample.path has the vertex {vertex}; give pairs [alpha_cumsum, beta_cumsum] of numbers"
                )
        return value


class EngineSection(Section):
    zero_stage: int = _key(2, EXECUTION, "DeepSpeed ZeRO stage", ge=0, le=3)
    precision: Literal["fp32", "bf16", "fp16"] = _key("fp32", EXECUTION, "Number format of forward and backward")
    offload_optimizer: bool = _key(False, EXECUTION, "Keep optimizer state in host memory")
    activation_checkpointing: bool = _key(False, EXECUTION, "Recompute activations to save memory")
    compile: bool = _key(False, EXECUTION, "Compile the network with torch.compile")
    threads: int = _key(0, EXECUTION, "Compute threads per worker; 0: cores divided by the workers of a node", ge=0)
    deepspeed: dict[str, Any] = _key({}, EXECUTION, "Further DeepSpeed configuration keys")


class TrackingSection(Section):
    backend: Literal["mlflow", "none"] = _key("mlflow", EXECUTION, "Where metrics go besides metrics.jsonl")
    uri: str = _key("", EXECUTION, "MLflow tracking URI; empty: sqlite at <storage>/mlflow.db")
    experiment: str = _key("rddm", EXECUTION, "MLflow experiment")
    parent: str = _key("", EXECUTION, "MLflow run id that this run is a child of, e.g. of a sweep")


def _is_vertex(value: Any) -> bool:
    try:
        return not isinstance(value, str) and len(value) == 2 and all(math.isfinite(float(each)) for each in value)
    except (TypeError, ValueError):
        return False
