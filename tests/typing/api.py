"""What type checkers make of the public names; checked by `make lint`, never run.

The first part must be accepted. Each line of the second is wrong, and says which error
it must be: an ignore that ignores nothing is itself an error of both checkers.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any, assert_type

from celery import Celery, shared_task
from pybreaker import CircuitBreaker
from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, scoped_session

import celery_resilience
from celery_resilience import (
    CircuitOpen,
    ConfigurationError,
    FailedTasks,
    Never,
    On,
    Resilience,
    ResilienceError,
    ResilientTask,
    Skip,
    Snooze,
    TaskContext,
    TaskOptions,
    TooManyErrors,
    add_task_context,
    batch,
    once,
    purge_once,
)
from celery_resilience.idempotency.once import AsyncOnce, Once

# --- what must be accepted --------------------------------------------------------------

app = Celery("shop")
resilience = Resilience(app)
Resilience().init_app(app)
answers = resilience.resource(bytearray, bytearray.clear, scope="child")
assert_type(answers(), bytearray)
assert_type(celery_resilience.__version__, str)
logging.getLogger().addFilter(TaskContext(missing="-"))
assert_type(add_task_context(None, "info", {"event": "x"}), MutableMapping[str, Any])


@app.task(base=ResilientTask)
def ship(order_id: int) -> int:
    """The shortest resilient task."""
    return order_id


@app.task(
    base=ResilientTask,
    bind=True,
    acks_late=True,
    max_retries=3,
    **TaskOptions(failed_queue="shop.refused", redact=["card"], max_crashes=2),
)
def charge(self: ResilientTask, order_id: int, card: str) -> None:
    """Celery's options and ours, with the task as its first argument."""
    if not card:
        raise Skip("nothing to charge", result=order_id)
    assert_type(self.resilience.stopping, bool)
    self.resilience.count("orders", shop="north", is_first=True)
    self.resilience.count("orders", 2.5)
    self.resilience.observe("amount_eur", 12.5, name="labels may be called so")
    if self.request.retries:
        raise Snooze(2.5, "the bank is closed")
    raise self.retry(countdown=3)


@app.task(base=ResilientTask, bind=True, **TaskOptions(circuit="bank"))
def pay(self: ResilientTask, order_id: int) -> int:
    """A call through a circuit, and one through another."""
    with self.resilience.circuit("mail"):
        return order_id


@app.task(base=ResilientTask, bind=True)
def enrich(self: ResilientTask, rows: list[int]) -> int:
    """A batch of a task, with what it comes to."""
    with self.resilience.batch(
        "rows", skip=ValueError, keep_failed=pay.s, key=int
    ) as b:
        for row in b.items(rows):
            with b.item(row):
                pay(row)
        assert_type(b.report["samples"][0]["id"], str)
    return b.report["ok"]


def enrich_by_hand(rows: list[int]) -> str:
    """One of no task."""
    try:
        with batch("rows", skip=(ValueError, KeyError), concurrency=4) as made:
            for row, zone in made.map(str, rows):
                with made.item(row):
                    enrich(zone)
    except TooManyErrors as exc:
        return str(exc.report["failed"])
    return made.name


def owe(order_id: int) -> int:
    """Instead."""
    return 0


@app.task(
    base=ResilientTask,
    **TaskOptions(circuit=CircuitBreaker(), if_circuit_open=owe),
)
def pay_by_own(order_id: int) -> int:
    """The app's own breaker, and a result for when it is open."""
    return order_id


def pay_from_the_web(order_id: int) -> float:
    """Outside of Celery."""
    try:
        with resilience.circuit("bank"):
            return 0.0
    except CircuitOpen as exc:
        assert_type(exc.name, str)
        return exc.retry_after_s


RULES = (
    Never(ValueError, "shop.NoSuchAccount"),
    On(ConnectionError, TimeoutError, attempts=8, backoff_s=(1, 300), deadline_s=3600),
    On("requests.HTTPError", attempts=None, backoff_s=0.5, deadline_s=60, budget="b"),
)


@app.task(base=ResilientTask, **TaskOptions(retry_rules=RULES))
def collect_debts(order_id: int) -> int:
    """Tried again by rules."""
    return order_id


NOT_KEPT: TaskOptions = {"failed_queue": False, "max_crashes": None}
SMALL: TaskOptions = {"memory_limit_mib": "25%"}
SMALLER: TaskOptions = {"memory_limit_mib": 300}


@shared_task(base=ResilientTask, **NOT_KEPT)
def apologise(order_id: int) -> None:
    """An app's options for many tasks, and no app yet."""


assert_type(ship, ResilientTask)
assert_type(charge, ResilientTask)
ship.delay(7)
charge.apply_async((7, "1234"), countdown=3)
ship.delay_on_commit(7)
ship.apply_async_on_commit((7,))


class ShopTask(ResilientTask):
    """A base class with the app's own defaults."""

    abstract = True
    acks_late = True
    failed_queue = "shop.failed"
    redact = ("card", "iban")
    max_crashes = 5


class Quiet(ResilientTask):
    """One that keeps nothing."""

    failed_queue = False
    max_crashes = None


def is_told(error: ResilienceError) -> str:
    """An error of ours has a text."""
    return str(error)


def failed_tasks() -> None:
    """The Python side of the command."""
    try:
        failed = FailedTasks(app)
    except ConfigurationError as error:
        is_told(error)
        return
    for found in failed.list(task="shop.*", since="2h", limit=50):
        assert_type(found.id, str)
        assert_type(failed.get(found.id).summary.message, str)
    report = failed.replay(group="a91f3c", dry_run=True)
    assert_type(len(report.sent), int)
    assert_type(failed.discard(["a91f"]), int)


def charge_once(session: Session, connection: Connection, engine: Engine) -> object:
    """A key in one's own transaction."""
    claimed = once(session, "charge:17")
    assert_type(claimed, Once)
    if claimed:
        claimed.save({"charge": 17})
    assert_type(once(connection, "charge:17", namespace="shop"), Once)
    assert_type(once("default", "charge:17"), Once)
    assert_type(purge_once(session, older_than_s=86_400, limit=500), int)
    resilience.create_once_table(engine)
    resilience.create_once_table(connection)
    return claimed.result


async def charge_once_async(
    session: AsyncSession, connection: AsyncConnection, local: scoped_session[Session]
) -> None:
    """Awaited where the session is."""
    claimed = await once(session, "charge:17")
    assert_type(claimed, AsyncOnce)
    if claimed:
        await claimed.save([1, 2])
    assert_type(await once(connection, "charge:17"), AsyncOnce)
    assert_type(await purge_once(connection, older_than_s=60), int)
    assert_type(once(local, "charge:17"), Once)
    await connection.run_sync(resilience.create_once_table)


# --- what must be refused ---------------------------------------------------------------


class Wrong(ResilientTask):
    """Options with the wrong types."""

    failed_queue = True  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    redact = "card"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    max_crashes = "3"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


TaskOptions(failed_queue=True)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
TaskOptions(redact="card")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
TaskOptions(max_crashes="3")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
TaskOptions(memory_limit_mib=["25%"])  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
TaskOptions(retry_rules=On(OSError))  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
TaskOptions(retry_rules=[OSError])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
TaskOptions(max_crash=3)  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportCallIssue]


@app.task(base=ResilientTask, **TaskOptions(max_crashes=2.5))  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
def wrong(order_id: int) -> None:
    """An option is checked where it is given."""


def wrong_once(session: Session, engine: Engine) -> None:
    """What has no transaction, and what is no key."""
    once(engine, "charge:17")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    once(session, 17)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    once(session)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    purge_once(session)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def wrong_calls(order_id: int) -> None:
    """Arguments that every call would refuse."""
    Resilience("shop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    resilience.resource(str, str.strip, scope="thread")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Resilience().init_app()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    FailedTasks()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    FailedTasks(app).replay(dry_run="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    FailedTasks(app).list(limit="50")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    On(OSError, attempt=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Never(OSError, attempts=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    batch("rows", skp=())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    On(KeyboardInterrupt)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Snooze("soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Snooze()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    celery_resilience.Nonsense()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
