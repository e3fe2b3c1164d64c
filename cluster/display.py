"""What a person sees while a run works: one moving line on a terminal, a line every few seconds elsewhere.

The same text for both; only a terminal gets the carriage return, so that a log file and a pipe stay readable.
"""

import shutil
import sys
import time
from typing import Any

from cluster.preprocess import Progress

LINE_EVERY_S = 5.0
MOVE_EVERY_S = 0.2


class Display:
    """Writes progress to stderr; what is the last word of a stage is always written."""

    def __init__(self) -> None:
        self.moving = False
        self.last_at = 0.0
        self.last_text = ""

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def move(self, text: str) -> None:
        """Where things are now; replaced by the next on a terminal, thinned out elsewhere."""
        now, every = time.monotonic(), MOVE_EVERY_S if sys.stderr.isatty() else LINE_EVERY_S
        if text == self.last_text or now - self.last_at < every:
            return
        self.last_at, self.last_text = now, text
        if not sys.stderr.isatty():
            sys.stderr.write(f"{text}\n")
            return
        width = shutil.get_terminal_size().columns - 1
        # Past the driver's log, which keeps only the lines that stay.
        stream: Any = getattr(sys.stderr, "console", sys.stderr)
        stream.write(f"\r{text[:width]:<{width}}")
        stream.flush()
        self.moving = True

    def clear(self) -> None:
        """Leave the moving line behind."""
        if self.moving:
            stream: Any = getattr(sys.stderr, "console", sys.stderr)
            stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            self.moving = False


def bar(done: float, total: float, width: int = 20) -> str:
    """A bar of `width` characters."""
    filled = int(width * done / total) if total else 0
    return "[" + "#" * filled + "." * (width - filled) + "]"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them; a question mark when unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def stage_line(progress: Progress) -> str:
    """A stage of preparation."""
    if progress.waiting_for:
        return f"{progress.stage}: waiting for {progress.waiting_for}, which is doing the same"
    return (
        f"{progress.stage:<9} {bar(progress.done, progress.total)} {progress.done} of {progress.total} tasks, "
        f"{progress.bytes / 1e6:.1f} MB, {progress.bytes_per_s / 1e6:.2f} MB/s, ETA {duration(progress.eta_s)}"
    )


def train_line(row: dict[str, Any], steps: int) -> str:
    """A step of training, from its metrics row."""
    named = (("train/loss", "loss", ".4f"), ("train/bpb", "bpb", ".4f"), ("perf/tokens_per_s", "tokens/s", ",.0f"))
    parts = [f"{name} {row[key]:{form}}" for key, name, form in named if isinstance(row.get(key), int | float)]
    eta = f"ETA {duration(row.get('run/eta_s'))}"
    return f"train     {bar(row['step'], steps)} step {row['step']} of {steps}, {', '.join([*parts, eta])}"
