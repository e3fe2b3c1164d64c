"""Where ZeRO keeps what a rank holds, shown as fragments.

    Zero12Holder   stages 1, 2: one flat fp32 partition per parameter group; DeepSpeed's mapping says which parameter's
                   values lie where in it
    Zero3Holder    stage 3: flat fp32 partitions per sub-group; every parameter is split evenly over the ranks, padded

The optimizer's state is read from the inner optimizer at the same place as the weights, never through DeepSpeed's links
to it: those are made once, after the first group's first step, and miss every other group.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from trainer.engine_plain import read_scalars, write_scalars
from trainer.fragments import PARAM, Fragment
from trainer.optim import create_state


class ZeroHolder(ABC):
    """What the stages share. `place(name)` is the flat tensor, the place in it, and the place in the parameter."""

    replicated = False

    def __init__(self, module: nn.Module, zero: Any, pattern: dict[str, Any], flats: list[Tensor]) -> None:
        self.params = dict(module.named_parameters())
        self.zero = zero
        self.pattern = pattern
        self.state = zero.optimizer.state
        create_state(zero.optimizer, flats, pattern)

    @abstractmethod
    def place(self, name: str) -> tuple[Tensor, int, int, int] | None:
        """The flat tensor with `count` values of a parameter: (flat, begin, start in the parameter, count)."""

    @abstractmethod
    def flat_of(self, name: str) -> Tensor:
        """The flat tensor under which the optimizer keeps the parameter's numbers."""

    def kinds(self) -> set[str]:
        """What there is of every parameter."""
        return {PARAM, *(key for key, zero in self.pattern.items() if zero is None)}

    def held(self) -> Iterator[Fragment]:
        """Every piece this rank holds, as views on the flat partitions."""
        for name in self.params:
            found = self.place(name)
            if found is None:
                continue
            flat, begin, start, count = found
            yield Fragment(name, PARAM, start, flat.data.narrow(0, begin, count))
            for key in sorted(self.kinds() - {PARAM}):
                yield Fragment(name, key, start, self.state[flat][key].narrow(0, begin, count))

    def scalars(self) -> dict[str, dict[str, float]]:
        """The optimizer's numbers per parameter."""
        return {name: read_scalars(self.state[self.flat_of(name)], self.pattern) for name in self.params}

    def set_scalars(self, scalars: dict[str, dict[str, float]]) -> None:
        """Set the optimizer's numbers; ZeRO keeps them once for many parameters, which must agree."""
        first: dict[int, tuple[str, dict[str, float]]] = {}
        for name in self.params:
            flat = self.flat_of(name)
            other, values = first.setdefault(id(flat), (name, scalars[name]))
            if values != scalars[name]:
                raise ValueError(
                    f"{name} and {other}: ZeRO keeps {values} for both, the checkpoint has {scalars[name]}"
                )
            write_scalars(self.state[flat], self.pattern, scalars[name])


class Zero12Holder(ZeroHolder):
    """Stages 1 and 2, fp32 and bf16."""

    def __init__(self, module: nn.Module, zero: Any, pattern: dict[str, Any]) -> None:
        flats = [group["params"][0] for group in zero.optimizer.param_groups]
        super().__init__(module, zero, pattern, flats)
        groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
        self.flats = {id(p): flat for flat, group in zip(flats, groups, strict=True) for p in group}

    def flat_of(self, name: str) -> Tensor:
        """This rank's partition of the parameter's group."""
        flat: Tensor = self.flats[id(self.params[name])]
        return flat

    def place(self, name: str) -> tuple[Tensor, int, int, int] | None:
        """What DeepSpeed's mapping says; None where this rank has nothing of the parameter."""
        mapping: Any = self.params[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        inside, outside = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return self.flat_of(name), inside.start, outside.start, inside.numel

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every parameter."""
        return {name: list(p.shape) for name, p in self.params.items()}

    def live(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, flattened: all ranks have all of it."""
        for name, param in self.params.items():
            yield name, param.data.view(-1)

    def publish(self) -> None:
        """Copy the partitions into the parameters and gather those of the other ranks."""
        self.zero.update_lp_params()


class Zero3Holder(ZeroHolder):
    """Stage 3. `gathered([param])` is a context in which a partitioned parameter is whole."""

    def __init__(self, module: nn.Module, zero: Any, pattern: dict[str, Any], rank: int, gathered: Any) -> None:
        super().__init__(module, zero, pattern, list(zero.fp32_partitioned_groups_flat))
        self.rank, self.gathered = rank, gathered

    def flat_of(self, name: str) -> Tensor:
        """This rank's partition of the parameter's sub-group."""
        group, _, _ = self.where(name)
        flat: Tensor = self.zero.fp32_partitioned_groups_flat[group]
        return flat

    def where(self, name: str) -> tuple[int, int, int]:
        """The parameter's sub-group, place in it, and number of values with padding."""
        group, begin, count = self.zero.grad_position[self.zero.get_param_id(self.params[name])]
        return group, int(begin), int(count)

    def place(self, name: str) -> tuple[Tensor, int, int, int] | None:
        """Rank r has the r-th equal part; the last parts may be short or empty, the rest is padding."""
        _, begin, size = self.where(name)
        start = self.rank * size
        count = min(size, self.params[name].ds_numel - start)  # type: ignore[attr-defined]
        return (self.flat_of(name), begin, start, count) if count > 0 else None

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every parameter."""
        return {name: list(p.ds_shape) for name, p in self.params.items()}  # type: ignore[attr-defined]

    def live(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, gathered one at a time; the small ones that ZeRO never partitions are there already."""
        for name, param in self.params.items():
            with ExitStack() as stack:
                if param.ds_status.name != "AVAILABLE":  # type: ignore[attr-defined]
                    stack.enter_context(self.gathered([param]))
                yield name, param.data.view(-1)

    def publish(self) -> None:
        """Copy the flat partitions into the parameters' own, as a step does, and gather the small ones again."""
        self.zero._partition_all_parameters()
        for group, _ in enumerate(self.zero.fp16_groups):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
