"""The DeepSpeed engine: ZeRO 0 to 3 behind the same protocol as the plain engine. The only file that imports deepspeed.

    deepspeed_config(run, world_size)   the whole DeepSpeed config, a pure function; refuses what breaks checkpoints
    DeepSpeedEngine                     train_step, eval_sum; fragments come from `engine_fragments`

What DeepSpeed does beyond gradients and partitions is left out: its optimizer, schedules, monitor and checkpoints. Its
scaling is undone: it averages over ranks, so every loss is multiplied by world_size / num_labels_global, and it is told
not to divide by the number of micro-batches. Its own clipping would be 1.0 unless set.
"""

import logging
import math
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import Precision, Run
from conf.zero_settings import refuse_extra
from trainer.distributed import RankInfo, private_extensions_folder, refuse_stale_locks
from trainer.engine import Objective, StepResult
from trainer.engine_plain import WholeHolder
from trainer.fragments import Held, fill
from trainer.optim import build_optimizer, refuse_unsliceable, set_lr, state_pattern

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
private_extensions_folder()
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402 (reads the environment set above)

from trainer.engine_fragments import Zero3Holder, Zero12Holder  # noqa: E402


def deepspeed_config(run: Run, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run; raises ValueError for a `zero.extra` that is not allowed."""
    refuse_extra(run.zero.extra)
    rows = run.train.micro_batch_rows
    config: dict[str, Any] = {
        # Nominal: how many micro-batches make a step is told at every one of them.
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "train_batch_size": rows * world_size,
        "gradient_clipping": run.train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**run.zero.extra, "stage": run.zero.stage},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if run.train.precision is Precision.bf16 and run.zero.stage == 0:
        # DeepSpeed's bf16 section without ZeRO has no fp32 weights.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif run.train.precision is Precision.bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def join_deepspeed() -> None:
    """Make DeepSpeed use the process group that is there, without building its shared-memory operator."""
    refuse_stale_locks()
    # Building takes minutes, and a killed build leaves a lock that stops every later start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls two collectives by their old names, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class DeepSpeedEngine(Held):
    """ZeRO around a module."""

    def __init__(self, run: Run, module: nn.Module, rank: RankInfo, device: torch.device) -> None:
        if run.zero.stage > 0:
            refuse_unsliceable(run)
        config = deepspeed_config(run, rank.world_size)
        join_deepspeed()
        self.module = module.to(device)
        self.rank, self.world_size, self.device = rank.rank, rank.world_size, device
        self.zero_stage = run.zero.stage
        masters = first_weights(run, module)
        self.zero, *_ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(run, module), config=config, dist_init_required=False
        )
        self.optimizer = self.zero.optimizer
        self.holder = make_holder(run, module, self.zero, rank.rank)
        if masters:
            self.set_weights(masters)

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put whole fp32 weights, flattened by name, in place of the rounded ones; optimizer state stays zero."""

        def reader(name: str, kind: str, start: int, count: int) -> Tensor:
            return weights[name][start : start + count] if kind == "param" else torch.zeros(count)

        fill(self.holder, reader, self.scalars())

    def train_step(self, batches: list[Any], objective: Objective, num_labels_global: int, lr: float) -> StepResult:
        """One optimizer step over the micro-batches `batches` of this rank."""
        self.zero.train()
        losses = []
        for number, batch in enumerate(batches, start=1):
            self.zero.set_gradient_accumulation_boundary(number == len(batches))
            loss = objective(self.zero, batch.tensors())
            scaled = loss * (self.world_size / max(1, num_labels_global))
            self.zero.backward(scaled, scale_wrt_gas=False)
            losses.append(loss.detach().double())
        set_lr(self.optimizer, lr)
        norm, skipped = self.step()
        return StepResult(float(torch.stack(losses).sum()), norm, skipped)

    def step(self) -> tuple[float, bool]:
        """Step the optimizer; returns the gradient norm before clipping, and whether the step was left out."""
        if self.zero_stage > 0:
            self.zero.step()
            return float(self.zero.get_global_grad_norm()), not self.zero.was_step_applied()
        # Without ZeRO DeepSpeed clips but does not tell the norm, and steps whatever it is.
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads))
        if math.isfinite(norm):
            self.zero.step()
            return norm, False
        self.zero.zero_grad()
        return norm, True

    @torch.no_grad()
    def eval_sum(self, batch: Any, objective: Objective) -> float:
        """The objective's sum on one batch; all ranks together, since ZeRO-3 gathers weights."""
        self.zero.eval()
        return float(objective(self.zero, batch.tensors()))


def first_weights(run: Run, module: nn.Module) -> dict[str, Tensor]:
    """The fp32 weights, where DeepSpeed would make its fp32 copy from weights rounded to bf16; empty where not."""
    if run.train.precision is not Precision.bf16 or run.zero.stage == 0:
        return {}
    return {name: p.detach().float().flatten().clone() for name, p in module.named_parameters()}


def make_holder(run: Run, module: nn.Module, zero: Any, rank: int) -> WholeHolder | Zero12Holder | Zero3Holder:
    """The fragments of the stage."""
    pattern = state_pattern(run)
    if run.zero.stage == 0:
        return WholeHolder(module, zero.optimizer, pattern)
    if run.zero.stage < 3:
        return Zero12Holder(module, zero.optimizer, pattern)
    return Zero3Holder(module, zero.optimizer, pattern, rank, deepspeed.zero.GatheredParameters)
