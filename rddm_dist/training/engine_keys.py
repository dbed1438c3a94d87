"""What `engine.deepspeed` may hold: DeepSpeed's keys by whose they are."""

from __future__ import annotations

import difflib
from typing import Any

from data_pipeline.errors import ConfigError

ZERO = "zero_optimization"
# engine.deepspeed.zero_optimization: how data moves, never what a step computes or where its state lives.
SWITCHES = (
    "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "overlap_comm",
    "ignore_unused_parameters", "memory_efficient_linear", "log_trace_cache_warnings", "enable_sanity_checks",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
)  # fmt: skip
COUNTS = {  # each with its least value
    "reduce_bucket_size": 1, "allgather_bucket_size": 1, "sub_group_size": 1, "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
}  # fmt: skip
# Top-level keys that may be given: what gradients travel in, and what DeepSpeed tells of itself, in its own words.
OPEN_KEYS = (
    "comms_logger", "communication_data_type", "dump_state", "flops_profiler", "memory_breakdown",
    "wall_clock_breakdown",
)  # fmt: skip
# Keys of DeepSpeed that follow from ours -> which of ours to set.
DERIVED_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "data_types": "engine.precision",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "compile": "engine.compile",
    "activation_checkpointing": "engine.activation_checkpointing",
    "checkpoint": "train.checkpoint_every",
    "steps_per_print": "train.log_every",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "tracking.backend"),
    f"{ZERO}.stage": "engine.zero_stage",
    f"{ZERO}.offload_optimizer": "engine.offload_optimizer",
    f"{ZERO}.cpu_offload": "engine.offload_optimizer",
}
# The others that DeepSpeed knows: they change what a step computes or where its state lives.
CLOSED_KEYS = (
    "aio", "autotuning", "compression_training",
    "curriculum_learning", "data_efficiency", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
    "disable_python_gc", "eigenvalue", "elasticity", "expert_parallel",
    "gradient_allreduce_op", "gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level",
    "managed_gradient_accumulation", "nebula", "pipeline", "prescale_gradients",
    "progressive_layer_drop", "quantize_training", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "sparse_attention", "sparse_gradients", "tensor_parallel", "timers", "use_data_before_expert_parallelism",
    "vocabulary_size", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip
CLOSED_ZERO_KEYS = (
    "allgather_partitions", "compute_grad_norm", "cpu_offload_param", "cpu_offload_use_pin_memory",
    "elastic_checkpoint", "leaf_module", "legacy_stage1", "load_from_fp32_weights", "mics_hierarchical_params_gather",
    "mics_shard_size", "offload_param", "override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights", "zeropp_loco_param",
)  # fmt: skip


def check_further_keys(further: dict[str, Any]) -> None:
    """Refuse what `engine.deepspeed` may not hold: of DeepSpeed's keys all but OPEN_KEYS, SWITCHES and COUNTS; and
    unknown ones.

    DeepSpeed itself ignores unknown keys, or stops on them only after the network was built.
    """
    zero = further.get(ZERO, {})
    if not isinstance(zero, dict):
        raise ConfigError(f"engine.deepspeed.{ZERO} must be a mapping, for example {{overlap_comm: true}}")
    known = [
        *DERIVED_KEYS,
        *CLOSED_KEYS,
        *OPEN_KEYS,
        *(f"{ZERO}.{key}" for key in (*SWITCHES, *COUNTS, *CLOSED_ZERO_KEYS)),
    ]
    given = {key: value for key, value in further.items() if key != ZERO}
    for key, value in {**given, **{f"{ZERO}.{key}": value for key, value in zero.items()}}.items():
        name, sub_key = f"engine.deepspeed.{key}", key.removeprefix(f"{ZERO}.")
        if key in DERIVED_KEYS:
            raise ConfigError(f"{name} is derived; remove it and set {DERIVED_KEYS[key]}")
        if key not in known:
            nearest = difflib.get_close_matches(key, [*known, ZERO], n=1, cutoff=0.0)[0]
            raise ConfigError(f"{name} is no key of DeepSpeed; the nearest is {nearest}")
        if key in CLOSED_KEYS or sub_key in CLOSED_ZERO_KEYS:
            allowed = ", ".join((*OPEN_KEYS, *(f"{ZERO}.{key}" for key in (*SWITCHES, *COUNTS))))
            raise ConfigError(f"{name} is not supported; remove it (these are: {allowed})")
        if sub_key in SWITCHES and not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} must be true or false")
        if sub_key in COUNTS and (type(value) is not int or value < COUNTS[sub_key]):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {COUNTS[sub_key]}")
