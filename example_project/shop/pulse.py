"""Signs of life of a worker and of beat, for `example_project/health.py`.

A worker's main process gives one with each heartbeat, while it has the broker; beat
with each task that it has sent.
"""

from __future__ import annotations

from pathlib import Path

from celery import signals


def keep(path: Path) -> None:
    """
    Touch *path* with every sign of life of this process.

    Args:
        path: The file; its age is the age of the last sign.
    """

    def touch(**_: object) -> None:
        path.touch()

    def on_beat(**_: object) -> None:
        # Children of a worker send tasks too: theirs would hide that it hangs.
        signals.after_task_publish.connect(touch, weak=False)

    signals.heartbeat_sent.connect(touch, weak=False)
    signals.beat_init.connect(on_beat, weak=False)
