"""Large messages are warned of by the worker that takes them."""

from __future__ import annotations

import pytest

from celery_resilience.events import emit
from celery_resilience.messages.warning import LargeMessages


def test_each_task_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Unless it has a limit of its own, which says that it may be so large."""
    for _ in range(2):  # the worker before this one is not heard any more
        LargeMessages(lambda task: task == "limited").attach()

    for task in ("pack", "limited", "pack", "", "ship"):
        emit("delivery.large_message_received", task=task, bytes=300 * 1024)

    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "a message of pack has 300 KiB",
        "a message of an unknown task has 300 KiB",
        "a message of ship has 300 KiB",
    ]
