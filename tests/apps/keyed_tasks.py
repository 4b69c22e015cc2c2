"""Tasks of the test app that have an idempotency key."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrying import SOON_S

from celery_resilience import Skip, soft_limit


def once_here(name: str) -> bool:
    """Whether this is the first time that anybody in the fleet comes here."""
    try:
        Path(f"{os.environ['FLEET_LEDGER']}.{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die_at(how: str, point: str, order_id: Any) -> None:
    """Kill this process at *point*, once for each order, where *how* is that point."""
    if how == point and once_here(f"{point}-{order_id}".replace("/", "-")):
        os.kill(os.getpid(), signal.SIGKILL)


def register(app: Any, base: Any, note: Callable[..., None]) -> None:
    """Add the tasks to *app*; with a plain *base* they have no keys."""

    def task(**options: Any) -> Any:
        return app.task(base=base, bind=True, shared=False, **options)

    def key_of(self: Any) -> Any:
        return getattr(getattr(self, "resilience", None), "key", None)

    def charge(self: Any, order_id: Any, amount: Any = 10, how: str = "") -> Any:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        die_at(how, "before", order_id)
        note("charged", order_id, self.request.id)
        die_at(how, "after", order_id)
        return {"order": order_id, "amount": amount}

    late = {"acks_late": True, "reject_on_worker_lost": True}
    task(name="charge", idempotency_key="charge:{order_id}", **late)(charge)
    task(
        name="charge_or_fail",
        idempotency_key="charge:{order_id}",
        if_interrupted="fail",
        **late,
    )(charge)

    def has_charged(order_id: Any, *_: Any, **__: Any) -> bool:
        ledger = Path(os.environ["FLEET_LEDGER"])
        return f'["charged", {order_id},' in ledger.read_text()

    task(
        name="charge_or_look",
        idempotency_key="charge:{order_id}",
        if_interrupted=has_charged,
        **late,
    )(charge)
    task(
        name="charge_or_error",
        idempotency_key="charge:{order_id}",
        if_done="error",
        if_running="error",
    )(charge)

    @task(
        name="keyed_sleep", idempotency_key="s:{name}", idempotency_lease_s=1.5, **late
    )
    def keyed_sleep(self: Any, name: str, seconds: float) -> str:
        note(self.name, self.request.id, self.request.retries, os.getpid())
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
        note("slept", name, self.request.id)
        return name

    @task(name="keyed_skip", idempotency_key="s:{name}", if_running="skip")
    def keyed_skip(self: Any, name: str, seconds: float) -> str:
        return keyed_sleep.run(name, seconds)

    @task(name="keyed_result", idempotency_key=True)
    def keyed_result(self: Any, name: str, value: Any) -> Any:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        return value

    @task(name="keyed_object", idempotency_key="o:{name}")
    def keyed_object(self: Any, name: str, size: int = 0) -> Any:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        return "x" * size if size else object()

    @task(name="keyed_retry", idempotency_key="r:{name}", max_retries=3)
    def keyed_retry(
        self: Any, name: str, failures: int = 2, countdown: float = SOON_S
    ) -> Any:
        note(
            self.name,
            self.request.id,
            self.request.retries,
            key_of(self),
            self.resilience.fencing_token if hasattr(self, "resilience") else 0,
        )
        if self.request.retries < failures:
            raise self.retry(countdown=countdown)
        return self.request.retries

    @task(
        name="keyed_autoretry",
        idempotency_key="r:{name}",
        autoretry_for=(ValueError,),
        retry_backoff=0.1,
        max_retries=3,
    )
    def keyed_autoretry(self: Any, name: str) -> Any:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        if self.request.retries < 2:
            raise ValueError("not yet")
        return self.request.retries

    @task(name="keyed_boom", idempotency_key="b:{name}")
    def keyed_boom(self: Any, name: str, path: str = "") -> Any:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        if not (path and Path(path).exists()):
            raise ValueError("not yet")
        note("effect", name)
        return "well"

    @task(name="keyed_says_skip", idempotency_key="k:{name}")
    def keyed_says_skip(self: Any, name: str) -> None:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        raise Skip("nothing to do", "skipped")

    @task(name="unique", idempotency_key="u:{name}", unique_enqueue=True)
    def unique(self: Any, name: str) -> str:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        return name

    @task(name="keyed_soft", idempotency_key="s:{name}", soft_time_limit=1)
    def keyed_soft(self: Any, name: str) -> str:
        note("handlers wait", soft_limit._waiting is not None)
        note(self.name, self.request.id, self.request.retries, key_of(self))
        return name

    @task(name="keyed_late_retry", idempotency_key="l:{name}")
    def keyed_late_retry(self: Any, name: str, path: str) -> str:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        while not Path(path).exists():
            time.sleep(0.05)
        raise self.retry(countdown=SOON_S)

    @task(name="keyed_replaced", idempotency_key="p:{name}")
    def keyed_replaced(self: Any, name: str, path: str, seconds: float = 0) -> Any:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        named = name if Path(path).exists() else object()
        raise self.replace(app.tasks["sleep_keyless"].si(named, seconds))

    @task(name="sleep_keyless")
    def sleep_keyless(self: Any, name: str, seconds: float) -> str:
        note(self.name, self.request.id, self.request.retries)
        time.sleep(seconds)
        return name

    @task(name="keyed_moved", idempotency_key="m:{name}")
    def keyed_moved(self: Any, name: str, to: str = "") -> Any:
        note(self.name, self.request.id, self.request.retries, key_of(self))
        if to:
            raise self.replace(self.s(to))
        return name

    @task(name="keyed_forwards", idempotency_key="f:{name}")
    def keyed_forwards(self: Any, name: str) -> None:
        note("headers", *(self.request.headers or {}))
        for number in (1, 2):
            app.tasks["keyed_result"].apply_async(
                (f"{name}{number}", number), headers=self.request.headers
            )
