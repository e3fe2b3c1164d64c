"""The typed run: every key, its default, its unit, and whether it changes the result.

`Run` is the contract between the command line and everything else. Hydra fills it from YAML (see `conf.compose`), it
becomes one object, and from then on nobody sees a `DictConfig`. Keys are *scientific* (they change the result: data,
model, optimizer, seed, batch) or *operational* (paths, ranks, tracker, intervals), marked by `op(...)`. The same run
name with other operational keys continues; with other scientific keys it is refused (`conf.identity`).
"""

import dataclasses
import enum
import math
from dataclasses import dataclass, field
from typing import Any

from conf.options import ADAMW, refuse_any, refuse_options
from conf.refusal import at_most, from_0_to_1, positive, refuse
from conf.zero_settings import refuse_extra

VERSION = 1


def op(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    """A field that does not change the result of a run."""
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata={"operational": True})
    return field(default=default, metadata={"operational": True})


class Stage(enum.Enum):
    """The stages of a run, in their order."""

    prepare = "prepare"
    train = "train"
    evaluate = "evaluate"
    export = "export"


class Precision(enum.Enum):
    """Arithmetic of forward and backward; master weights and optimizer state are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class EngineKind(enum.Enum):
    """Who partitions and steps: DeepSpeed ZeRO, or plain PyTorch, the truth it is compared with."""

    deepspeed = "deepspeed"
    plain = "plain"


class Attention(enum.Enum):
    """Which attention kernel; `auto` picks varlen on CUDA and the faster of sdpa and varlen on CPU."""

    auto = "auto"
    formula = "formula"
    sdpa = "sdpa"
    varlen = "varlen"


class WandbMode(enum.Enum):
    """`auto` is online when the environment has a W&B key and offline otherwise."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class RunInfo:
    """Which run this is."""

    name: str = op("default")
    seed: int = 0
    fresh: bool = op(False)
    allow: list[str] = op(factory=list)

    def __post_init__(self) -> None:
        """Refuse names that are not one plain folder name, and seeds that generators do not take."""
        if not 0 <= self.seed < 2**63:
            raise refuse("run.seed", self.seed, "must be from 0 to below 2**63", "for example run.seed=0")
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        if not plain.isalnum() or not self.name.isascii() or self.name.startswith((".", "-")):
            raise refuse(
                "run.name",
                self.name,
                "must be one folder name of letters, digits, '-', '_', '.'",
                "for example run.name=first",
            )


@dataclass(kw_only=True, slots=True)
class Paths:
    """Where runs and stage outputs live; on more than one node both must be on a shared file system."""

    runs: str = op("runs")
    store: str = op("store")

    def __post_init__(self) -> None:
        """Refuse places without a name."""
        for name in ("runs", "store"):
            if not getattr(self, name).strip():
                raise refuse(f"paths.{name}", "''", "must name a folder", f"for example paths.{name}={name}")


@dataclass(kw_only=True, slots=True)
class Corpus:
    """The raw text. `path` is a path, a glob, a folder, or a list of them; `reader` is a registered reader."""

    name: str = "corpus"
    reader: str = "text"
    path: Any = None
    text_key: str = "text"
    id_key: str | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a path that is neither a string nor a list of strings."""
        value = self.path
        if (
            value is None
            or isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(p, str) for p in value))
        ):
            return
        raise refuse(
            "corpus.path",
            value,
            "must be a path, a glob, a folder, or a list of them",
            "for example corpus.path=/data/*.jsonl",
        )


@dataclass(kw_only=True, slots=True)
class Tokenizer:
    """Train a byte-level BPE on at most `sample_bytes` of the corpus, or import a `tokenizer.json` from `path`."""

    name: str = "bpe"
    vocab_size: int = 4096
    path: str | None = None
    sample_bytes: int = 16_000_000

    def __post_init__(self) -> None:
        """Refuse vocabularies too small for 256 bytes and the special tokens, and an import of nothing."""
        positive("tokenizer", self, "sample_bytes")
        at_most("tokenizer", self, vocab_size=2**24)
        if self.name == "file" and not self.path:
            raise refuse(
                "tokenizer.path",
                self.path,
                "tokenizer=file imports a tokenizer.json, and none is named",
                "for example tokenizer.path=/data/tokenizer.json, or tokenizer=bpe to train one",
            )
        if self.path is None and self.vocab_size < 260:
            raise refuse(
                "tokenizer.vocab_size", self.vocab_size, "must hold 256 bytes and the special tokens", "use 260 or more"
            )


@dataclass(kw_only=True, slots=True)
class Data:
    """From documents to rows. A task reads about `task_bytes` of raw bytes; a row has `row_tokens` tokens."""

    row_tokens: int = 256
    heldout_fraction: float = 0.02
    task_bytes: int = 32_000_000
    max_document_bytes: int = 50_000_000
    quarantine_limit: float = op(0.01)
    filters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse sizes, fractions and filters that cannot be."""
        positive("data", self, "row_tokens", "task_bytes", "max_document_bytes")
        from_0_to_1("data", self, "heldout_fraction", "quarantine_limit", with_1=False)
        for name, parameters in self.filters.items():
            if not isinstance(parameters, dict | None):
                raise refuse(
                    f"data.filters.{name}",
                    parameters,
                    "must be the filter's parameters by name",
                    f"for example data.filters.{name}.limit=200, or data.filters.{name}={{}} for its defaults",
                )


@dataclass(kw_only=True, slots=True)
class Model:
    """The shape of the model. `name` is a registered model; `options` are for models of other packages."""

    name: str = "decoder"
    layers: int = 4
    width: int = 192
    heads: int = 6
    kv_heads: int = 2
    ffn_width: int = 512
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    attention: Attention = op(Attention.auto)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse shapes whose heads do not divide."""
        positive("model", self, "layers", "width", "heads", "kv_heads", "ffn_width", "max_positions")
        positive("model", self, "rope_theta", "norm_eps")
        at_most("model", self, layers=10**4, width=2**20, ffn_width=2**22, max_positions=2**24)
        if self.name == "decoder":
            refuse_any("model.options", self.options, "model.name=decoder")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise refuse(
                "model.heads",
                self.heads,
                f"must divide model.width={self.width} into heads of even width",
                "choose another model.heads or model.width",
            )
        if self.heads % self.kv_heads:
            raise refuse(
                "model.kv_heads",
                self.kv_heads,
                f"must divide model.heads={self.heads}",
                f"for example model.kv_heads={self.heads}",
            )


@dataclass(kw_only=True, slots=True)
class Objective:
    """What is minimized; `name` is a registered objective."""

    name: str = "causal_lm"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse options that would be dropped."""
        if self.name == "causal_lm":
            refuse_any("objective.options", self.options, "objective.name=causal_lm")


@dataclass(kw_only=True, slots=True)
class Train:
    """How long, how much at once, and how often to look."""

    steps: int = 200
    global_batch_rows: int = 16
    clip_norm: float = 1.0
    precision: Precision = Precision.fp32
    engine: EngineKind = op(EngineKind.deepspeed)
    micro_batch_rows: int = op(8)
    loss_chunk_tokens: int = op(2048)
    eval_every: int = op(100)
    eval_rows: int = op(64)
    checkpoint_every: int = op(50)
    keep_checkpoints: int = op(3)
    log_every: int = op(10)
    sample_tokens: int = op(64)
    sample_prompts: list[str] = op(factory=list)

    def __post_init__(self) -> None:
        """Refuse counts of zero, and counts that can only be a slip."""
        positive("train", self, "steps", "global_batch_rows", "clip_norm", "micro_batch_rows", "loss_chunk_tokens")
        positive("train", self, "eval_every", "eval_rows", "checkpoint_every", "log_every")
        at_most("train", self, steps=10**9, global_batch_rows=10**8, micro_batch_rows=10**8)
        if self.sample_tokens < 0:
            raise refuse("train.sample_tokens", self.sample_tokens, "must be 0 or more", "use train.sample_tokens=0")
        if self.keep_checkpoints < 2:
            raise refuse(
                "train.keep_checkpoints",
                self.keep_checkpoints,
                "must be at least 2, so that a damaged one has one before it",
                "use train.keep_checkpoints=2",
            )


@dataclass(kw_only=True, slots=True)
class Optim:
    """The optimizer; weight decay reaches matrices only, never norms (two parameter groups)."""

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a learning rate that cannot learn, and rates outside their range."""
        positive("optim", self, "lr", "eps")
        from_0_to_1("optim", self, "beta1", "beta2", with_1=False)
        if not 0 <= self.weight_decay < math.inf:
            raise refuse("optim.weight_decay", self.weight_decay, "must be 0 or more", "for example 0.1")
        if self.name == "adamw":
            refuse_options("optim.options", self.options, ADAMW)


@dataclass(kw_only=True, slots=True)
class Schedule:
    """Learning rate over steps: linear warmup, then `name`, down to `final_fraction` of the peak."""

    name: str = "cosine"
    warmup_fraction: float = 0.1
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Refuse fractions outside 0 to 1."""
        from_0_to_1("schedule", self, "warmup_fraction", "final_fraction", with_1=True)


@dataclass(kw_only=True, slots=True)
class Zero:
    """DeepSpeed's ZeRO stage (0 to 3) and allow-listed settings that pass through to its config."""

    stage: int = op(1)
    extra: dict[str, Any] = op(factory=dict)

    def __post_init__(self) -> None:
        """Refuse stages that do not exist, and settings that are not known to leave result and checkpoints alone."""
        if self.stage not in (0, 1, 2, 3):
            raise refuse("zero.stage", self.stage, "no such ZeRO stage", "use zero.stage=0, 1, 2 or 3")
        refuse_extra(self.extra)


@dataclass(kw_only=True, slots=True)
class Cluster:
    """Which Ray, and how much of it. Without an address a private local Ray is started and ended."""

    address: str | None = op(None)
    ranks: int = op(2)
    workers: int = op(2)
    cpus_per_rank: float = op(1.0)
    gpus_per_rank: int = op(-1)
    dashboard_port: int = op(0)
    start_timeout_s: float = op(120.0)
    max_restarts: int = op(3)

    def __post_init__(self) -> None:
        """Refuse counts of zero; gpus_per_rank=-1 means one where the cluster has GPUs."""
        positive("cluster", self, "ranks", "workers", "cpus_per_rank", "start_timeout_s")
        at_most("cluster", self, ranks=10**5, workers=10**6)
        if self.max_restarts < 0:
            raise refuse("cluster.max_restarts", self.max_restarts, "must be 0 or more", "use cluster.max_restarts=0")
        if self.gpus_per_rank not in (-1, 0, 1):
            raise refuse(
                "cluster.gpus_per_rank",
                self.gpus_per_rank,
                "a rank drives one GPU or none",
                "use -1 (automatic), 0 or 1",
            )


@dataclass(kw_only=True, slots=True)
class Tracker:
    """Where metrics go besides metrics.jsonl, which is always written."""

    wandb: WandbMode = op(WandbMode.auto)
    project: str = op("zeroray")
    entity: str | None = op(None)
    group: str | None = op(None)
    tags: list[str] = op(factory=list)


@dataclass(kw_only=True, slots=True)
class Run:
    """What to do: everything a run is, as one object."""

    version: int = op(VERSION)
    run: RunInfo = field(default_factory=RunInfo)
    paths: Paths = field(default_factory=Paths)
    stages: list[Stage] = op(factory=lambda: list(Stage))
    plugins: list[str] = field(default_factory=list)
    corpus: Corpus = field(default_factory=Corpus)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    zero: Zero = field(default_factory=Zero)
    cluster: Cluster = field(default_factory=Cluster)
    tracker: Tracker = field(default_factory=Tracker)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot run."""
        if self.version != VERSION:
            raise refuse("version", self.version, f"this zeroray reads version {VERSION}", "leave version out")
        if self.data.row_tokens > self.model.max_positions:
            raise refuse(
                "data.row_tokens",
                self.data.row_tokens,
                f"rows are longer than model.max_positions={self.model.max_positions}",
                f"use data.row_tokens={self.model.max_positions} or raise model.max_positions",
            )
        if self.train.engine is EngineKind.plain and self.zero.stage not in (0, 1):
            raise refuse("zero.stage", self.zero.stage, "train.engine=plain has no ZeRO", "use train.engine=deepspeed")
        if not self.stages:
            raise refuse("stages", "[]", "nothing to do", "for example stages=[prepare,train,evaluate,export]")
        if len(set(self.stages)) != len(self.stages):
            names = list(dict.fromkeys(stage.name for stage in self.stages))
            raise refuse("stages", "[...]", "a stage is named twice", f"use stages=[{','.join(names)}]")
        if self.data.heldout_fraction == 0 and {Stage.train, Stage.evaluate} & set(self.stages):
            raise refuse(
                "data.heldout_fraction",
                self.data.heldout_fraction,
                "train and evaluate measure on held-out text, and none would be held out",
                "for example data.heldout_fraction=0.02, or stages=[prepare]",
            )
