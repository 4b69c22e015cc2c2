"""What adopting celery-resilience changes for a task. Plain data, no I/O.

The caller reads an app and hands in facts; what plain Celery does with them, and
what a resilient task does, is decided here.

Source: Celery 5.7, `worker/request.py` (`on_timeout`, `on_failure`), and kombu 5.7
for what a transport keeps of a message that it has handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

#: Version of the document that `to_dict` makes.
SCHEMA = 1

#: Transports, by kombu's `driver_type`, that deliver a message again whose whole
#: worker has died; the others have deleted it when they handed it over.
HOLDING = frozenset({"amqp", "redis", "sqs", "pgmq", "gcpubsub", "azureservicebus"})

#: Seconds after which a transport takes a message for lost that nobody has
#: acknowledged, unless it is told otherwise (kombu 5.7; RabbitMQ since 3.8.17).
REDELIVERED_AFTER_S: Mapping[str, float] = {
    "amqp": 1_800.0,
    "redis": 3_600.0,
    "sqs": 1_800.0,
    "pgmq": 1_800.0,
}

#: Pools whose tasks run in children, which may die alone; and those that end a run
#: at its hard limit (`concurrency/thread.py` drops the limit, Celery 5.7).
WITH_CHILDREN = frozenset({"prefork", "processes"})
WITH_LIMITS = WITH_CHILDREN | {"gevent"}


class Fate(StrEnum):
    """What becomes of a message whose run did not end in success."""

    GONE = "gone"
    KEPT = "kept"
    REJECTED = "rejected"
    KEPT_AND_REJECTED = "kept_and_rejected"
    RETRIED = "retried"
    RUNS_AGAIN = "runs_again"
    INTERRUPTED = "interrupted"
    LOOKED_AT = "looked_at"
    RUNS_FOR_EVER = "runs_for_ever"
    LOST = "lost"
    CANNOT_HAPPEN = "cannot_happen"


#: Each fate as a sentence.
MEANINGS: Mapping[Fate, str] = {
    Fate.GONE: "acknowledged; nothing is left to run again",
    Fate.KEPT: "kept in the failed queue, then acknowledged; it can be replayed",
    Fate.REJECTED: "rejected: dropped, or put on the broker's dead-letter queue",
    Fate.KEPT_AND_REJECTED: "kept in the failed queue, then rejected",
    Fate.RETRIED: "sent again as a retry, by Celery's retry_on_worker_lost",
    Fate.RUNS_AGAIN: "runs again, at most max_crashes times, then as on_failure",
    Fate.INTERRUPTED: "delivered again, and fails as interrupted, unless it is done",
    Fate.LOOKED_AT: "delivered again; if_interrupted looks whether it runs again",
    Fate.RUNS_FOR_EVER: "delivered again, for ever",
    Fate.LOST: "lost: the broker had nothing left to deliver again",
    Fate.CANNOT_HAPPEN: "cannot happen: no hard limit, or not in this pool",
}


@dataclass(frozen=True, slots=True)
class Fates:
    """
    What becomes of a message in one case.

    Attributes:
        plain: With Celery alone.
        resilient: With a resilient task.
    """

    plain: Fate
    resilient: Fate


@dataclass(frozen=True, slots=True)
class Risk:
    """
    Something to know before adopting, or in spite of it.

    Attributes:
        code: One word that does not change between releases.
        plain: It holds with Celery alone.
        resilient: It holds with a resilient task.
        text: What it means, and what to do.
    """

    code: str
    plain: bool
    resilient: bool
    text: str


@dataclass(frozen=True, slots=True)
class AppFacts:
    """
    What an app's configuration says.

    Attributes:
        driver: kombu's `driver_type` of the broker's transport.
        redelivered_after_s: The visibility timeout that is configured, if one is.
        pool: `worker_pool`; the worker's `-P` is not known here.
        is_enabled: `resilience_enabled`.
        has_store: Failed tasks have a store.
    """

    driver: str
    redelivered_after_s: float | None = None
    pool: str = "prefork"
    is_enabled: bool = True
    has_store: bool = True

    @property
    def patience_s(self) -> float | None:
        """Seconds until an unacknowledged message is delivered again, if ever."""
        return self.redelivered_after_s or REDELIVERED_AFTER_S.get(self.driver)


@dataclass(frozen=True, slots=True)
class Keys:
    """
    The idempotency keys of a task.

    Attributes:
        key: The template; or "a callable", or "all arguments".
        asks_for: The options that are True because the task has a key; without it they
            would be as the app has them.
        if_running: What becomes of a duplicate while another run has the key.
        if_done: What becomes of a duplicate once the effect has happened.
        if_interrupted: What becomes of a run after one that ended with its process:
            "rerun", "fail" or "a callable".
        unique_enqueue: A second send while the first waits is not sent.
    """

    key: str
    asks_for: tuple[str, ...]
    if_running: str
    if_done: str
    if_interrupted: str
    unique_enqueue: bool


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """
    What a task says, with the app's defaults filled in.

    Attributes:
        base: Qualified name of its base class.
        failed_queue: Where an ordinary failure goes; None: it is not kept.
        max_retries: Of Celery; None: without end.
        retry_rules: What each of its rules says, in their order.
        has_own_strategy: Its messages do not become Celery's ordinary requests.
        keys: Its idempotency keys; None where it has none.
        app_acks_late, app_reject_on_worker_lost: What the app has, for options that
            are True because of a key.
    """

    name: str
    base: str
    is_resilient: bool
    failed_queue: str | None
    acks_late: bool = False
    reject_on_worker_lost: bool | None = None
    retry_on_worker_lost: bool = False
    acks_on_failure: bool = True
    acks_on_timeout: bool = True
    soft_time_limit_s: float | None = None
    time_limit_s: float | None = None
    max_retries: int | None = 3
    retry_rules: tuple[str, ...] = ()
    max_crashes: int = 3
    has_own_strategy: bool = False
    keys: Keys | None = None
    app_acks_late: bool = False
    app_reject_on_worker_lost: bool | None = None

    @property
    def plain(self) -> TaskFacts:
        """The same task without its key."""
        if self.keys is None:
            return self
        asked = self.keys.asks_for
        return replace(
            self,
            keys=None,
            acks_late=self.app_acks_late if "acks_late" in asked else self.acks_late,
            reject_on_worker_lost=(
                self.app_reject_on_worker_lost
                if "reject_on_worker_lost" in asked
                else self.reject_on_worker_lost
            ),
        )


@dataclass(frozen=True, slots=True)
class TaskExplained:
    """
    What adopting changes, or has changed, for one task.

    Attributes:
        task: The task's name.
        base: Qualified name of its base class.
        is_resilient: The task is resilient already.
        adopt: What to write; None where it is resilient already.
        acks_late, reject_on_worker_lost, acks_on_failure, acks_on_timeout: As the
            task has them. Adopting does not change them; a key does.
        soft_time_limit_s, time_limit_s: The limits, in seconds.
        redelivered_after_s: Visibility timeout or RabbitMQ's consumer timeout, in
            seconds: how long the broker waits for an acknowledgement.
        max_crashes: Runs that may end with their process.
        failed_queue: Where an ordinary failure goes; routes that name an exception
            or a reason may send others elsewhere.
        is_kept: Its failures are kept, or would be.
        on_failure: A run raised, and no retry is left.
        on_dead_child: A pool's child died under the run.
        on_dead_worker: The whole worker died under the run.
        on_hard_limit: A run met its hard time limit.
        risks: See `Risk`.
        keys: See `Keys`; None where the task has none. Beside it, what plain Celery
            does is what it would do without the key.
        retry_rules: What each retry rule of the task says, in their order.
    """

    task: str
    base: str
    is_resilient: bool
    adopt: str | None
    acks_late: bool
    reject_on_worker_lost: bool | None
    acks_on_failure: bool
    acks_on_timeout: bool
    soft_time_limit_s: float | None
    time_limit_s: float | None
    redelivered_after_s: float | None
    max_crashes: int
    failed_queue: str | None
    is_kept: bool
    on_failure: Fates
    on_dead_child: Fates
    on_dead_worker: Fates
    on_hard_limit: Fates
    risks: tuple[Risk, ...]
    keys: Keys | None = None
    retry_rules: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The public JSON, schema 1."""
        return {"schema": SCHEMA, **asdict(self), "risks": [*map(asdict, self.risks)]}


def explain_task(task: TaskFacts, app: AppFacts) -> TaskExplained:
    """Say what a resilient task does that the same task of Celery's does not."""
    is_kept = task.failed_queue is not None and app.is_enabled
    without_key, with_key = _fates(task.plain, app), _fates(task, app)
    fates = {
        name: Fates(without_key[name].plain, found.resilient)
        for name, found in with_key.items()
    }
    if not app.is_enabled:
        fates = {name: Fates(f.plain, f.plain) for name, f in fates.items()}
    elif not is_kept:
        fates = {
            name: Fates(f.plain, _NOT_KEPT.get(f.resilient, f.resilient))
            for name, f in fates.items()
        }
    return TaskExplained(
        task=task.name,
        base=task.base,
        is_resilient=task.is_resilient,
        adopt=None if task.is_resilient else _how_to_adopt(task.base),
        acks_late=task.acks_late,
        reject_on_worker_lost=task.reject_on_worker_lost,
        acks_on_failure=task.acks_on_failure,
        acks_on_timeout=task.acks_on_timeout,
        soft_time_limit_s=task.soft_time_limit_s,
        time_limit_s=task.time_limit_s,
        redelivered_after_s=app.patience_s,
        max_crashes=task.max_crashes,
        failed_queue=task.failed_queue,
        is_kept=is_kept,
        risks=tuple(_risks(task, app, fates)),
        keys=task.keys,
        retry_rules=task.retry_rules,
        **fates,
    )


def _risks(
    task: TaskFacts, app: AppFacts, fates: Mapping[str, Fates]
) -> Iterator[Risk]:
    for code, rule in RISKS.items():
        plain = rule.holds(task.plain, app, fates).plain
        resilient = rule.holds(task, app, fates).resilient if app.is_enabled else plain
        if plain or resilient:
            yield Risk(code, plain=plain, resilient=resilient, text=rule.text)


# --- what becomes of a message -----------------------------------------------------

_NOT_KEPT = {Fate.KEPT: Fate.GONE, Fate.KEPT_AND_REJECTED: Fate.REJECTED}


def _fates(task: TaskFacts, app: AppFacts) -> dict[str, Fates]:
    return {
        "on_failure": _on_failure(task),
        "on_dead_child": _on_dead_child(task, app),
        "on_dead_worker": _on_dead_worker(task, app),
        "on_hard_limit": _on_hard_limit(task, app),
    }


def _on_failure(task: TaskFacts) -> Fates:
    if task.acks_late and not task.acks_on_failure:
        return Fates(Fate.REJECTED, Fate.KEPT_AND_REJECTED)
    return Fates(Fate.GONE, Fate.KEPT)


def _on_dead_child(task: TaskFacts, app: AppFacts) -> Fates:
    if app.pool not in WITH_CHILDREN:
        return Fates(Fate.CANNOT_HAPPEN, Fate.CANNOT_HAPPEN)
    if task.retry_on_worker_lost and task.max_retries != 0:
        return Fates(Fate.RETRIED, Fate.RETRIED)
    failed = _on_failure(task)
    if not task.acks_late:
        return failed
    plain = Fate.RUNS_FOR_EVER if task.reject_on_worker_lost else failed.plain
    if task.reject_on_worker_lost is False:
        return Fates(plain, failed.resilient)
    return Fates(plain, _bounded(task, failed))


def _on_dead_worker(task: TaskFacts, app: AppFacts) -> Fates:
    if not task.acks_late or app.driver not in HOLDING:
        return Fates(Fate.LOST, Fate.LOST)
    return Fates(Fate.RUNS_FOR_EVER, _again(task))


def _on_hard_limit(task: TaskFacts, app: AppFacts) -> Fates:
    if task.time_limit_s is None or app.pool not in WITH_LIMITS:
        return Fates(Fate.CANNOT_HAPPEN, Fate.CANNOT_HAPPEN)
    if task.acks_late and not task.acks_on_timeout:
        # At its last crash a message is acknowledged (delivery/request.py).
        return Fates(Fate.RUNS_FOR_EVER, _bounded(task, Fates(Fate.GONE, Fate.KEPT)))
    return Fates(Fate.GONE, Fate.KEPT)


def _bounded(task: TaskFacts, failed: Fates) -> Fate:
    return _again(task) if task.max_crashes > 1 else failed.resilient


def _again(task: TaskFacts) -> Fate:
    """What becomes of a message that is delivered again."""
    if task.keys is None or task.keys.if_interrupted == "rerun":
        return Fate.RUNS_AGAIN
    return Fate.INTERRUPTED if task.keys.if_interrupted == "fail" else Fate.LOOKED_AT


def _how_to_adopt(base: str) -> str:
    if base in ("celery.app.task.Task", "celery.contrib.django.task.DjangoTask"):
        return "base=ResilientTask"
    return f"class Base(ResilientTask, {base.rpartition('.')[2]}), and base=Base"


# --- what to know --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Holds:
    plain: bool
    resilient: bool


@dataclass(frozen=True, slots=True)
class _Rule:
    holds: Callable[[TaskFacts, AppFacts, Mapping[str, Fates]], _Holds]
    text: str


def _both(holds: bool) -> _Holds:
    return _Holds(holds, holds)


def _new(holds: bool) -> _Holds:
    return _Holds(plain=False, resilient=holds)


def _loops(task: TaskFacts, app: AppFacts, fates: Mapping[str, Fates]) -> _Holds:
    return _Holds(
        plain=any(f.plain is Fate.RUNS_FOR_EVER for f in fates.values()),
        resilient=any(f.resilient is Fate.RUNS_FOR_EVER for f in fates.values()),
    )


def _reruns(task: TaskFacts, app: AppFacts, fates: Mapping[str, Fates]) -> _Holds:
    dead = fates["on_dead_child"]
    return _new(
        dead.resilient is Fate.RUNS_AGAIN and dead.plain is not Fate.RUNS_FOR_EVER
    )


def _outlives(task: TaskFacts, app: AppFacts, fates: Mapping[str, Fates]) -> _Holds:
    patience_s = app.patience_s
    outlives = (
        task.acks_late
        and patience_s is not None
        and (task.time_limit_s is None or task.time_limit_s >= patience_s)
    )
    return _Holds(
        plain=outlives,
        # There, what a living worker holds is renewed.
        resilient=outlives and app.driver != "redis",
    )


def _limits_disagree(
    task: TaskFacts, app: AppFacts, fates: Mapping[str, Fates]
) -> _Holds:
    soft, hard = task.soft_time_limit_s, task.time_limit_s
    return _both(soft is not None and hard is not None and soft >= hard)


#: What to look at, and what to say; in the order in which they are told.
RISKS: Mapping[str, _Rule] = {
    "disabled": _Rule(
        lambda task, app, fates: _both(not app.is_enabled),
        "resilience_enabled is False: everything is as in plain Celery",
    ),
    "not_kept": _Rule(
        lambda task, app, fates: _new(task.failed_queue is None),
        "failed_queue or a route says not to keep its failures",
    ),
    "no_store": _Rule(
        lambda task, app, fates: _new(not app.has_store),
        "there is no store: failed tasks stay in their queue, and a message whose "
        "whole worker dies is given up after 20 redeliveries; set "
        "resilience_store_url",
    ),
    "keys_wait": _Rule(
        lambda task, app, fates: _new(task.keys is not None and not app.has_store),
        "it has an idempotency key and there is no store: its runs wait until there "
        "is; set resilience_store_url",
    ),
    "reruns_after_crash": _Rule(
        _reruns,
        "Celery fails it when its child dies, and here it runs again up to "
        "max_crashes times: make its effect repeatable, or set "
        "reject_on_worker_lost=False",
    ),
    "runs_for_ever": _Rule(
        _loops,
        "what kills its process, or meets its hard limit, is delivered for ever",
    ),
    "lost_with_worker": _Rule(
        lambda task, app, fates: _Holds(
            plain=fates["on_dead_worker"].plain is Fate.LOST,
            resilient=fates["on_dead_worker"].resilient is Fate.LOST,
        ),
        "a run is lost when its whole worker dies: it is acknowledged before it "
        "runs, or this broker deletes what it hands over; acks_late=True keeps it "
        "on brokers that hold messages",
    ),
    "outlives_redelivery": _Rule(
        _outlives,
        "it may run longer than the broker waits for an acknowledgement, and is "
        "then delivered a second time: set a lower time_limit, or a longer "
        "visibility_timeout or consumer_timeout",
    ),
    "limits_disagree": _Rule(
        _limits_disagree,
        "soft_time_limit is not below time_limit: the child is killed before the "
        "soft limit may clean up",
    ),
    "limits_not_enforced": _Rule(
        lambda task, app, fates: _both(
            task.time_limit_s is not None and app.pool not in WITH_LIMITS
        ),
        "this pool does not enforce its time_limit",
    ),
    "no_hard_limit": _Rule(
        lambda task, app, fates: _both(task.time_limit_s is None),
        "a run that hangs holds its child for ever, and never fails",
    ),
    "retries_for_ever": _Rule(
        lambda task, app, fates: _both(task.max_retries is None),
        "max_retries is None: where it retries, it never fails for good",
    ),
    "own_strategy": _Rule(
        lambda task, app, fates: _new(task.has_own_strategy),
        "it has a Strategy of its own (celery-batches does): what becomes of its "
        "messages is not settled here",
    ),
}


def summary_of(explained: list[TaskExplained]) -> Iterator[tuple[str, str, list[str]]]:
    """Each risk that holds for a task as it is or would be: code, text, tasks."""
    for code, rule in RISKS.items():
        tasks = [
            task.task
            for task in explained
            if any(risk.code == code and risk.resilient for risk in task.risks)
        ]
        if tasks:
            yield code, rule.text, tasks
