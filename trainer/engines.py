"""Which engine: `train.engine` names it, and only that one's library is imported."""

import torch
from torch import nn

from conf.refusal import refuse
from conf.schema import EngineKind, Run
from trainer.distributed import RankInfo
from trainer.engine import Engine


def build_engine(run: Run, module: nn.Module, rank: RankInfo, device: torch.device) -> Engine:
    """The engine that `train.engine` names, around `module`; the process group is already there."""
    refuse_untracked(run, module)
    if run.train.engine is EngineKind.plain:
        from trainer.engine_plain import PlainEngine  # noqa: PLC0415 (the other engine's library is slow to import)

        return PlainEngine(run, module, rank, device)
    from trainer.engine_deepspeed import DeepSpeedEngine  # noqa: PLC0415

    return DeepSpeedEngine(run, module, rank, device)


def refuse_untracked(run: Run, module: nn.Module) -> None:
    """Refuse a module with values that a checkpoint would not hold."""
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    if frozen:
        raise refuse("model.name", run.model.name, f"parameter {frozen[0]} is frozen", "train all parameters")
    buffers = sorted({name for name, _ in module.named_buffers()} & set(module.state_dict()))
    if buffers:
        raise refuse(
            "model.name",
            run.model.name,
            f"buffer {buffers[0]} is saved state that is not a parameter",
            "register it with persistent=False and compute it in the constructor",
        )
