"""Which settings of DeepSpeed's zero_optimization section pass through `zero.extra`, and why others do not."""

from typing import Any

from conf.options import refuse_options
from conf.refusal import refuse

# Settings of the zero_optimization section that change speed and memory only. All were read for what they do to the
# layout of partitions; those in FORBIDDEN are known to change it, or the result.
ALLOWED: dict[str, type] = {
    "allgather_bucket_size": int,
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "log_trace_cache_warnings": bool,
    "overlap_comm": bool,
    "reduce_bucket_size": int,
    "reduce_scatter": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_model_persistence_threshold": int,
    "stage3_module_granularity_threshold": int,
    "stage3_param_persistence_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "sub_group_size": int,
    "use_multi_rank_bucket_allreduce": bool,
}
OFFLOAD = "its state lies where checkpoints are not yet proven to find it"
QUANTIZED = "it rounds what is communicated, so the result would depend on the world size"
FORBIDDEN = {
    "stage": "the stage has its own key; use zero.stage",
    "round_robin_gradients": "DeepSpeed then stores partitions under the wrong parameters' names, in silence",
    "parameter_alignment": "it pads between parameters, which checkpoints are not proven with",
    "elastic_checkpoint": "DeepSpeed's checkpoints are not used",
    "load_from_fp32_weights": "DeepSpeed's checkpoints are not used",
    "stage3_gather_16bit_weights_on_model_save": "DeepSpeed's checkpoints are not used",
    "compute_grad_norm": "the gradient norm is always reported",
    "offload_optimizer": OFFLOAD,
    "offload_param": OFFLOAD,
    "cpu_offload": OFFLOAD,
    "zenflow": OFFLOAD,
    "zero_hpz_partition_size": "it keeps a second partition, which checkpoints are not proven with",
    "zero_quantized_weights": QUANTIZED,
    "zero_quantized_gradients": QUANTIZED,
    "zero_quantized_nontrainable_weights": QUANTIZED,
}


def refuse_extra(extra: dict[str, Any]) -> None:
    """Refuse keys of `zero.extra` that are not known to leave result and checkpoints alone, and wrong types."""
    for key, value in extra.items():
        if key in FORBIDDEN:
            raise refuse(f"zero.extra.{key}", value, FORBIDDEN[key], f"leave out zero.extra.{key}")
    refuse_options("zero.extra", extra, ALLOWED)
