"""How a run is, read from its folder alone: Ray, W&B and the network may be gone.

    status_of(folder) -> dict      everything, as JSON values: what `zeroray status RUN --json` prints
    status_text(status) -> str     the same for a person
    list_row, list_text            one line a run

The state comes from two facts, the ledger's last `start` or `end` and whether a live driver holds the lease:

    running   a live driver                      queued    submitted as a Ray job, its driver has not begun
    done, stopped, failed, refused               as the last `end` says
    dead      begun, not ended, no driver        unknown   a folder in which nothing has begun
"""

import os
import time
from typing import Any

import yaml

from cluster.run_folder import RunFolder, clock
from conf.schema import Stage
from data_pipeline.store import read_json

SHOWN_METRICS = ("train/loss", "train/bpb", "eval/heldout/bpb", "perf/tokens_per_s", "run/eta_s")
WORDS = {"dead": "dead (its driver is gone; it continues with the same command)"}
FINISHED = {"done", "skipped"}


def status_of(folder: RunFolder) -> dict[str, Any]:
    """Everything that is known of a run; the keys are stable."""
    events, holder, submission = folder.events(), folder.holder(), folder.submission()
    run, row = run_yaml(folder), folder.last_row()
    state = state_of(events, holder is not None, submission)
    end = last(events, "end")
    ended = state not in ("running", "queued", "dead", "unknown")
    steps = group(run, "train").get("steps")
    step = row.get("step", 0)
    return {
        "name": folder.name,
        "state": state,
        "step": step,
        "steps": steps,
        "stages": stages_of(events, run, step, steps, state),
        "attempts": attempts_of(events),
        "data": {"accounting": accounting_of(folder, run)},
        "metrics": row,
        "evaluation": evaluation_of(folder),
        "exit_code": end.get("exit_code") if ended else None,
        "reason": end.get("reason") if ended else None,
        "driver": {k: holder[k] for k in ("pid", "host")} if holder else None,
        "submission": submission,
        "paths": paths_of(folder, run),
    }


def state_of(events: list[dict[str, Any]], alive: bool, submission: dict[str, Any] | None) -> str:
    """One word for how the run is."""
    if alive:
        return "running"
    marks = [e for e in events if e["event"] in ("start", "end")]
    if submission and not any(e["time"] >= submission["time"] for e in marks):
        return "queued"
    if not marks:
        return "unknown"
    return "dead" if marks[-1]["event"] == "start" else str(marks[-1].get("state", "unknown"))


def last(events: list[dict[str, Any]], event: str) -> dict[str, Any]:
    """The newest event of a name; empty when there is none."""
    return next((e for e in reversed(events) if e["event"] == event), {})


def run_yaml(folder: RunFolder) -> dict[str, Any]:
    """The run's settings as they stand in its folder, of whatever version; empty when they cannot be read."""
    try:
        with open(folder.yaml_path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def group(run: dict[str, Any], name: str) -> dict[str, Any]:
    """A group of a run's settings; empty where the file holds something else."""
    found = run.get(name)
    return found if isinstance(found, dict) else {}


def stages_of(
    events: list[dict[str, Any]], run: dict[str, Any], step: int, steps: int | None, state: str
) -> dict[str, dict[str, Any]]:
    """Each stage by name with its state, how much of it is done, and of how much."""
    named = run.get("stages")
    wanted = named if isinstance(named, list) and named else [stage.name for stage in Stage]
    seen = [str(e["stage"]) for e in events if e["event"] == "stage" and "stage" in e]
    parts = [name for name in dict.fromkeys(seen) if name not in Stage.__members__]  # of prepare, in their order
    names = [name for stage in Stage if stage.name in (*wanted, *seen) for name in parts_of(stage, parts)]
    found: dict[str, dict[str, Any]] = {name: {"state": "waiting", "done": 0, "total": None} for name in names}
    for event in events:
        if event["event"] == "stage" and "stage" in event:
            found.get(str(event["stage"]), {}).update(
                {k: v for k, v in event.items() if k not in ("event", "time", "stage")}
            )
    if found.get("train", {}).get("state") in ("started", "progress"):
        found["train"] |= {"done": step, "total": steps}
    for entry in found.values():
        entry["state"] = stage_word(str(entry["state"]), state)
    return found


def parts_of(stage: Stage, parts: list[str]) -> list[str]:
    """A stage and, after prepare, what it consists of."""
    return [stage.name, *(parts if stage is Stage.prepare else [])]


def stage_word(said: str, run_state: str) -> str:
    """A stage's state for a reader: what was begun and has nobody working on it is unfinished."""
    if said in FINISHED:
        return "done"
    if said in ("started", "progress"):
        return "running" if run_state == "running" else "unfinished"
    return said


def attempts_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each life of a gang: when it began, from which step, and why it ended."""
    found: list[dict[str, Any]] = []
    for event in events:
        rest = {k: v for k, v in event.items() if k not in ("event", "time")}
        if event["event"] == "attempt":
            found.append({**rest, "started_at": event["time"]})
        elif not found:
            continue
        elif event["event"] == "cause":
            found[-1] |= {**rest, "ended_at": event["time"]}
        elif event["event"] == "resumed":
            found[-1]["resumed_step"] = event.get("step")
        elif event["event"] == "end":
            found[-1] |= {"end": event.get("state"), "ended_at": event["time"]}
    return found


def accounting_of(folder: RunFolder, run: dict[str, Any]) -> dict[str, Any] | None:
    """What became of every document: from the manifest of the documents stage that the ledger names."""
    store = group(run, "paths").get("store")
    try:
        accounting = read_json(f"{store}/documents/{folder.stage_key('documents')}/manifest.json").get("accounting")
    except (OSError, ValueError):
        return None
    return accounting if isinstance(accounting, dict) else None


def evaluation_of(folder: RunFolder) -> dict[str, Any] | None:
    """The final evaluation, once there is one."""
    try:
        value = read_json(f"{folder.path}/evaluation.json")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def paths_of(folder: RunFolder, run: dict[str, Any]) -> dict[str, str | None]:
    """Where things of this run are; None for what is not there yet."""
    inside = {name: f"{folder.path}/{name}" for name in ("run.yaml", "ledger.jsonl", "metrics.jsonl", "export", "logs")}
    there = {name: path if os.path.exists(path) else None for name, path in inside.items()}
    return {"folder": folder.path, "store": group(run, "paths").get("store"), **there}


# --- for a person -------------------------------------------------------------------------------------------------


def status_text(status: dict[str, Any]) -> str:
    """A run on half a screen."""
    state, step = status["state"], f"step {status['step']}" + (f" of {status['steps']}" if status["steps"] else "")
    lines = [f"{status['name']}: {WORDS.get(state, state)}, {step}"]
    if status["reason"]:
        lines.append(f"  {status['reason']}")
    if status["driver"]:
        lines.append(f"  driver      process {status['driver']['pid']} on {status['driver']['host']}")
    if state == "queued":
        lines.append(f"  job         {status['submission']['id']} at {status['submission']['address']}")
    for name, entry in status["stages"].items():
        lines.append(f"  {name if name in Stage.__members__ else f'  {name}':<11} {stage_text(entry)}")
    lines += [f"  attempt {n}: {attempt_text(entry)}" for n, entry in list(enumerate(status["attempts"], 1))[-5:]]
    metrics = [f"{k} {v:.6g}" for k in SHOWN_METRICS if isinstance(v := status["metrics"].get(k), int | float)]
    if metrics:
        lines.append(f"  metrics     {'   '.join(metrics)}")
    if status["data"]["accounting"]:
        lines.append(f"  accounting  {accounting_text(status['data']['accounting'])}")
    shown = {"folder": status["paths"]["folder"], "export": status["paths"]["export"]}
    lines += [f"  {name:<11} {path}" for name, path in shown.items() if path]
    return "\n".join(lines) + "\n"


def stage_text(entry: dict[str, Any]) -> str:
    """One stage."""
    if entry["state"] == "waiting" or entry["total"] is None:
        return str(entry["state"])
    return f"{entry['state']:<11} {entry['done']} of {entry['total']}"


def attempt_text(entry: dict[str, Any]) -> str:
    """One attempt."""
    parts = [f"began {clock(entry['started_at'])}"]
    if "resumed_step" in entry:
        parts.append(f"resumed at step {entry['resumed_step']}")
    if "cause" in entry:
        rank = f" of rank {entry['rank']}" if entry.get("rank") is not None else ""
        parts.append(f"{entry['cause']}{rank}: {str(entry.get('detail', '')).strip().partition(chr(10))[0]}")
    if "end" in entry:
        parts.append(f"ended {entry['end']}")
    return ", ".join(parts)


def accounting_text(counts: dict[str, Any]) -> str:
    """The equation that the program checks."""
    sums = {name: sum(counts.get(name, {}).values()) for name in ("filtered", "duplicates", "quarantined")}
    parts = [f"kept {counts['kept']}", *(f"{name} {number}" for name, number in sums.items())]
    return f"read {counts['read']} = {' + '.join(parts)}"


def list_row(folder: RunFolder) -> dict[str, Any]:
    """A run in a list; a folder that cannot be read does not hide the others."""
    try:
        status = status_of(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unknown = dict.fromkeys(("steps", "exit_code", "loss", "bpb", "updated_at"))
        return {"name": folder.name, "state": f"unreadable ({error})", "step": 0, **unknown, "path": folder.path}
    events = folder.events()
    kept = {name: status[name] for name in ("name", "state", "step", "steps", "exit_code")}
    row = status["metrics"]
    figures = {"loss": row.get("train/loss"), "bpb": row.get("train/bpb")}
    return {**kept, **figures, "updated_at": events[-1]["time"] if events else None, "path": folder.path}


def list_text(rows: list[dict[str, Any]]) -> str:
    """Runs as a table."""
    now = time.time()
    table = [("NAME", "STATE", "STEP", "LOSS", "LAST EVENT", "FOLDER")]
    for row in rows:
        step = f"{row['step']}/{row['steps']}" if row["steps"] else str(row["step"])
        loss = f"{row['loss']:.4f}" if isinstance(row["loss"], int | float) else "-"
        age = f"{ago(now - row['updated_at'])} ago" if row["updated_at"] else "-"
        table.append((row["name"], row["state"], step, loss, age, row["path"]))
    widths = [max(len(line[i]) for line in table) for i in range(6)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)
    return "\n".join(lines) + "\n"


def ago(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
