"""kombu's filesystem transport, whose messages appear whole or not at all.

kombu 5.7 opens a message's file and then writes it (``filesystem.py:264``). A
worker that is quick takes the empty file, cannot decode it, and ends. The
resilient worker waits for the file; with this both runs are spared, for the
demo is not about that.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from time import monotonic
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """Writes a message beside its place, and then moves it there."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        name = f"{round(monotonic() * 1000)}_{uuid.uuid4()}"
        folder = Path(self.data_folder_out)
        unfinished = folder / f"{name}.unfinished"
        unfinished.write_text(dumps(payload))
        os.replace(unfinished, folder / f"{name}.{queue}.msg")


class Transport(filesystem.Transport):
    """The filesystem transport with that channel."""

    Channel = Channel
