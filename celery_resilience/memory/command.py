"""`celery -A shop inspect resilience_memory`."""

from __future__ import annotations

from typing import Any

from celery.worker.control import inspect_command


@inspect_command(name="resilience_memory")
def resilience_memory(state: Any, **_: Any) -> dict[str, Any]:
    """Memory of the children, the tasks that grow most first, and of the container."""
    setup = getattr(state.consumer, "resilience_memory", None)
    if setup is None:
        return {"error": "nobody looks at memory here"}
    found: dict[str, Any] = setup.watch.report()
    return found
