"""`make chaos`: one run, killed at random moments until it is done; its weights must be those of a run left alone.

    python tests/chaos.py --kills 20 --seed 1

Kills are SIGKILLs of the whole process tree after a random time, of one random process of it, or of a rank at a named
point of a checkpoint save. A line a life, then a JSON verdict; exit 0 when nothing was lost, repeated or changed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
from processes import TINY, events, kill_tree, rows, start, zeroray
from test_killed import finished_shards, weights, write_corpus

STEPS = 400
LONGER = (f"train.steps={STEPS}", "train.checkpoint_every=20", "train.eval_every=100")
POINTS = [
    "checkpoint.before_tensors",
    "checkpoint.after_tensors",
    "checkpoint.before_manifest",
    "checkpoint.after_manifest",
]


def life(folder: Path, args: list[str], draw: random.Random) -> str:
    """One life of the run, ended by a kill unless it is done first; says how it ended."""
    way = draw.choice(["tree", "tree", "process", "point"])
    point = {"ZERORAY_KILL_AT": draw.choice(POINTS)} if way == "point" else {}
    process = start(folder, *args, **point)
    deadline = time.monotonic() + draw.uniform(2, 45)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is not None:
        return f"ended with {process.returncode}"
    if way == "process":
        victims = psutil.Process(process.pid).children(recursive=True)
        if victims:
            victim = draw.choice(victims)
            name = " ".join(victim.cmdline())[:40]
            victim.send_signal(signal.SIGKILL)
            time.sleep(draw.uniform(0, 10))
            kill_tree(process)
            return f"killed {name}, then the tree"
    kill_tree(process)
    return f"killed the tree{' (with a rank killed at ' + point['ZERORAY_KILL_AT'] + ')' if point else ''}"


def main() -> int:
    """Parse, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    said = parser.parse_args()
    draw = random.Random(said.seed)
    folder = Path(tempfile.mkdtemp(prefix="zeroray-chaos-"))
    corpus = write_corpus(folder)
    args = ["run", *TINY, f"corpus.path={corpus}", "run.name=one", *LONGER]
    (folder / "alone").mkdir()
    assert zeroray(folder / "alone", *args).returncode == 0, (folder / "alone" / "output.txt").read_text()
    kills, rewritten, finished, shards = 0, 0, 0, {}
    run = folder / "runs" / "one"
    while kills < said.kills:
        ended = life(folder, args, draw)
        now = finished_shards(folder / "store")
        rewritten += sum(shards[p] != now.get(p) for p in shards)
        shards = now
        sys.stdout.write(f"{kills + 1:4d}  step {len(rows(run)):3d}  {ended}\n")
        sys.stdout.flush()
        kills += ended.startswith("killed")
        if ended == "ended with 0":  # done before the kill: once more from the raw text
            assert weights(run) == weights(folder / "alone" / "runs" / "one"), f"{run}: other weights"
            finished += 1
            os.rename(run, f"{run}.{finished}")
            shutil.rmtree(folder / "store")
            shards = {}
    last = zeroray(folder, *args)
    reference = folder / "alone" / "runs" / "one"
    verdict = {
        "kills": kills,
        "seed": said.seed,
        "exit_code": last.returncode,
        "same_weights": last.returncode == 0 and weights(run) == weights(reference),
        "metrics_once": [r["step"] for r in rows(run)] == list(range(1, STEPS + 1)),
        "same_losses": [r["train/loss"] for r in rows(run)] == [r["train/loss"] for r in rows(reference)],
        "shards_written_again": rewritten,
        "runs_finished": finished + (last.returncode == 0),
        "resumed": len(events(run, "resumed")),
        "folder": str(folder),
    }
    sys.stdout.write(json.dumps(verdict, indent=2) + "\n")
    good = verdict["same_weights"] and verdict["metrics_once"] and verdict["same_losses"] and not rewritten
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
