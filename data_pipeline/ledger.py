"""The ledger of a run: one JSON object a line, appended and fsynced, readable with `cat` when everything else is dead.

Every line has `time` (Unix seconds), `event` (a short name) and the fields of that event. A line cut short by a kill
or a full disk is skipped by readers; the next writer starts on a new line. Lines are single `write` calls on a file
opened for appending, so several processes of one host may write.
"""

import json
import os
import time
from typing import Any


class Ledger:
    """Appends to and reads `<folder>/ledger.jsonl`."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/ledger.jsonl"

    def append(self, event: str, **fields: Any) -> None:
        """Append one event, durable when this returns; raises OSError when the disk is full."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.lseek(fd, 0, os.SEEK_END)
            cut = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
            os.write(fd, (("\n" if cut else "") + line + "\n").encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self) -> list[dict[str, Any]]:
        """All whole events, oldest first; what is torn or is no event is left out."""
        if not os.path.exists(self.path):
            return []
        events = []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict) and "event" in event and isinstance(event.get("time"), int | float):
                    events.append(event)
        return events
