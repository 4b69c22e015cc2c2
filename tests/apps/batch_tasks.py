"""Tasks of the test app that work at many items."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
from keyed_tasks import die_at
from retrying import SOON_S

from celery_resilience.events import observe
from celery_resilience.outcome import Settlement

#: What a thread that helps knows of the one that runs the task.
CARRIED: ContextVar[str] = ContextVar("carried", default="")


def register(app: Any, base: Any, note: Callable[..., None]) -> None:
    """Add the tasks to *app*, and tell what the main process hears of their batches."""

    def task(name: str, **options: Any) -> Any:
        late = {"acks_late": True, "reject_on_worker_lost": True, **options}
        return app.task(base=base, bind=True, shared=False, name=name, **late)

    def settled(settlement: Settlement) -> None:
        if "batch" in settlement.facts:
            note("settled", settlement.task_id, settlement.facts["batch"])

    for outcome in ("succeeded", "failed"):
        observe(f"delivery.{outcome}", settled)

    def started(self: Any) -> None:
        note(self.name, self.request.id, self.request.retries)

    @task("import_fat_rows", max_crashes=9)
    def import_fat_rows(
        self: Any, count: int, bad: list[int], deaths: list[int], chunk: int
    ) -> Any:
        started(self)
        bad_rows, process = set(bad), psutil.Process()
        before = most = process.memory_info().rss
        path = f"{os.environ['FLEET_LEDGER']}.rows"
        with (
            open(path, "a", buffering=1) as rows,
            self.resilience.batch(
                "rows", key="id", chunk=chunk, skip=ValueError
            ) as batch,
        ):
            for row in batch.items(_fat_rows(count)):
                with batch.item(row):
                    if row["id"] in deaths:
                        die_at("at", "at", row["id"])
                    if row["id"] in bad_rows:
                        raise ValueError(f"row {row['id']} is bad")
                    rows.write(f"{row['id']}\n")
                if row["id"] % 100 == 0:
                    most = max(most, process.memory_info().rss)
        note("grown_mib", (most - before) >> 20)
        return batch.report

    @task("import_slowly")
    def import_slowly(
        self: Any, count: int, gate_at: int, gate: str, how: str = "", chunk: int = 10
    ) -> Any:
        started(self)
        with self.resilience.batch("rows", chunk=chunk) as batch:
            for number in batch.items(range(count)):
                with batch.item(number):
                    note("row", number, self.request.id)
                    if number == gate_at:
                        while gate and not Path(gate).exists():
                            time.sleep(0.02)
                        die_at(how, "kill", self.request.id)
                        if how == "retry" and self.request.retries == 0:
                            raise self.retry(countdown=SOON_S)
        return batch.report

    @task("call_for_each")
    def call_for_each(self: Any, down: str, count: int) -> Any:
        started(self)

        @self.resilience.circuit("bank")
        def call(number: int, down: str) -> None:
            if Path(down).exists():
                note("failed_call", number)
                time.sleep(0.3)  # what others know of the circuit may be so old
                raise ConnectionError("the bank is away")

        with self.resilience.batch("calls", chunk=40) as batch:
            for number in batch.items(range(count)):
                with batch.item(number):
                    if number >= 50:
                        call(number, down)
                    note("row", number, self.request.id)
        return batch.report

    @task("wait_for_each")
    def wait_for_each(self: Any, count: int, seconds: float) -> Any:
        started(self)
        CARRIED.set(self.request.id)

        def fetch(number: int) -> list[str]:
            time.sleep(seconds)
            if number % 10 == 3:
                raise LookupError(f"no {number}")
            return [CARRIED.get(), self.request.id]

        began = time.monotonic()
        fetched = []
        with self.resilience.batch(
            "waits", skip=LookupError, concurrency=10, chunk=count
        ) as batch:
            for number, answer in batch.map(fetch, range(count)):
                with batch.item(number):
                    fetched.append([number, *answer])
        note("waited", time.monotonic() - began, fetched)
        return batch.report

    @task("import_or_keep")
    def import_or_keep(self: Any, count: int, bad: list[int], password: str) -> Any:
        started(self)
        with self.resilience.batch(
            "rows", key=int, chunk=7, keep_failed=import_one.s
        ) as batch:
            for number in batch.items(range(count)):
                with batch.item(number):
                    if number in bad:
                        raise KeyError(f"row {number} {password}")
        return batch.report

    @task("import_one", acks_late=False)
    def import_one(self: Any, number: int) -> int:
        note("one", number, self.request.id)
        return number

    @task("import_too_many")
    def import_too_many(self: Any, mended: str) -> Any:
        started(self)
        with self.resilience.batch("rows", chunk=10, max_errors=5) as batch:
            for number in batch.items(range(40)):
                with batch.item(number):
                    if number % 2 and number >= 20 and not Path(mended).exists():
                        raise KeyError("no")
                    note("row", number, self.request.id)
        return batch.report

    @task("import_with_stop")
    def import_with_stop(self: Any, count: int) -> Any:
        started(self)
        with self.resilience.batch("rows", stop=PermissionError) as batch:
            for number in batch.items(range(count)):
                with batch.item(number):
                    note("row", number, self.request.id)
                    raise PermissionError("the password is wrong")
        return batch.report

    @task("import_in_slices", soft_time_limit=1)
    def import_in_slices(self: Any, count: int, seconds: float) -> Any:
        started(self)
        with self.resilience.batch("rows", chunk=5) as batch:
            for number in batch.items(range(count)):
                with batch.item(number):
                    time.sleep(seconds)
                note("row", number, self.request.id)
        return batch.report

    @task("import_into_table")
    def import_into_table(self: Any, url: str, ids: list[int], how: str = "") -> Any:
        from sqlalchemy import create_engine, text
        from sqlalchemy.orm import Session

        started(self)
        engine = create_engine(url)
        try:
            with (
                Session(engine) as session,
                self.resilience.batch("rows", chunk=4, session=session) as batch,
            ):
                for number in batch.items(ids):
                    with batch.item(number):
                        words = {"id": number}
                        session.execute(text("INSERT INTO bought VALUES (:id)"), words)
                        if number == 6:
                            die_at(how, "kill", number)
        finally:
            engine.dispose()
        return batch.report


def _fat_rows(count: int) -> Iterator[dict[str, Any]]:
    """A hundred times what a child may gain, were they all held."""
    for number in range(count):
        yield {"id": number, "text": f"{number:08}" * 4_000}
