"""How far a run is: the small, human-readable half of a checkpoint (the tensors are the other half).

`TrainState` knows nothing of ranks: step, tokens and samples are global, the order program says which samples come
next on any number of ranks. `world_size` and `zero_stage` record who wrote it, and are never needed to read it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from conf.refusal import BadRequest
from data_pipeline.order import OrderProgram

VERSION = 1


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Where training stands after `step` optimizer steps.

    `order` is the order program (None where samples come from elsewhere), `metrics_bytes` the length of `metrics.jsonl`
    that belongs to this state, `parent` the commit this one continues, relative to the run folder. `extra` is for other
    programs' plain values.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    order: OrderProgram | None = None
    metrics_bytes: int = 0
    parent: str | None = None
    generation: int = 1
    seed: int = 0
    world_size: int = 1
    zero_stage: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """The state as a plain JSON object."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "order": None if self.order is None else self.order.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """The state of a JSON object; raises ValueError when it was written by a newer version or lacks a field."""
        if value.get("version") != VERSION:
            raise BadRequest(
                f"TrainState version {value.get('version')} cannot be read, this program reads {VERSION}\n"
                "continue this run with the program that wrote it"
            )
        names = {f.name for f in dataclasses.fields(cls)}
        if set(value) != names:
            raise ValueError(f"TrainState has the wrong fields: {sorted(names ^ set(value))}")
        order = None if value["order"] is None else OrderProgram.from_json(value["order"])
        return cls(**{**value, "order": order})
