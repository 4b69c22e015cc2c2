"""Tasks of the test app that call a dependency, which is away while a file is there."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybreaker
from keyed_tasks import once_here
from retrying import SOON_S

from celery_resilience import CircuitOpen

#: The user's own, in each child.
PLAIN = pybreaker.CircuitBreaker(fail_max=3, reset_timeout=600, name="own")


def register(app: Any, base: Any, note: Callable[..., None]) -> None:
    """Add the tasks to *app*."""

    def task(name: str, **options: Any) -> Any:
        return app.task(base=base, bind=True, shared=False, name=name, **options)

    def call(self: Any, down: str) -> str:
        note(self.name, self.request.id, self.request.retries)
        if Path(down).exists():
            note("failed_call", self.request.id)
            raise ConnectionError("the bank is away")
        return "paid"

    def pay(self: Any, down: str) -> str:
        return call(self, down)

    task("pay", circuit="bank")(pay)
    if "queues" in app.conf.get("resilience_circuits", {}).get("bank", {}):
        task("pay_or_pause", circuit="bank", if_circuit_open="pause")(pay)
    task("pay_or_fail", circuit="bank", if_circuit_open="fail")(pay)
    task("pay_or_owe", circuit="bank", if_circuit_open=lambda down: "owed")(pay)
    task("pay_by_own", circuit=PLAIN)(pay)
    task("pay_once", circuit="bank", idempotency_key="pay:{down}")(pay)
    task(
        "pay_with_autoretry",
        circuit="bank",
        autoretry_for=(Exception,),
        max_retries=1,
        retry_backoff=False,
        default_retry_delay=SOON_S,
    )(pay)

    @task("pay_within", autoretry_for=(Exception,), max_retries=0)
    def pay_within(self: Any, down: str) -> str:
        with self.resilience.circuit("bank"):
            return call(self, down)

    @task("pay_or_know")
    def pay_or_know(self: Any, down: str) -> str:
        try:
            with self.resilience.circuit("bank"):
                return call(self, down)
        except CircuitOpen as exc:
            return f"{exc.name} is open"

    @task("pay_slowly", circuit="bank", acks_late=True)
    def pay_slowly(self: Any, down: str, gate: str) -> str:
        import time

        note("began", self.request.id)
        while not Path(gate).exists():
            time.sleep(0.02)
        return call(self, down)

    @task(
        "pay_at",
        circuit="bank",
        autoretry_for=(OSError,),
        max_retries=None,
        default_retry_delay=1,
    )
    def pay_at(self: Any, port: int) -> str:
        note("called", self.request.id)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as bank:
            if bank.recv(1) != b"+":
                raise ConnectionError("the bank hung up")
        note("paid", self.request.id)
        return "paid"

    @task("probe_dies", circuit="bank", acks_late=True, reject_on_worker_lost=True)
    def probe_dies(self: Any, down: str) -> str:
        if not Path(down).exists() and once_here("probe"):
            note("died", self.request.id)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, down)
