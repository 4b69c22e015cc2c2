"""Every metric of a worker: the one list from which all else is made.

What is counted, what Prometheus and OpenTelemetry are told, the dashboard, the alerts
and the reference page all read it, so that they cannot tell of different things.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from celery_resilience.outcome import Outcome

PREFIX = "celery_resilience."

#: What stands for the values of a label that are more than there may be.
OTHER = "other"


class Kind(StrEnum):
    """What an instrument does with what it is told."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


#: Units as OpenTelemetry writes them, and how Prometheus ends a name for each.
_ENDINGS = {"s": "_seconds", "By": "_bytes"}


@dataclass(frozen=True, slots=True)
class Instrument:
    """
    One metric.

    Attributes:
        name: As OpenTelemetry has it.
        kind: Counter, gauge or histogram.
        unit: "s", "By", "1", or what is counted in braces.
        labels: Names of its labels, in the order in which values are given.
        help: One sentence.
        bounds: Upper ends of a histogram's buckets.
        is_probed: Asked for in a thread of its own; without an answer there is none.
    """

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()
    is_probed: bool = False

    @property
    def family(self) -> str:
        """Prometheus's name of it, without the ending of a counter."""
        return self.name.replace(".", "_") + _ENDINGS.get(self.unit, "")

    @property
    def series(self) -> tuple[str, ...]:
        """The names that stand in an expression of Prometheus."""
        if self.kind is Kind.COUNTER:
            return (self.family + "_total",)
        if self.kind is Kind.HISTOGRAM:
            return tuple(self.family + end for end in ("_bucket", "_count", "_sum"))
        return (self.family,)

    def is_same(self, name: str, kind: Kind, labels: tuple[str, ...]) -> bool:
        """Whether what is told by these is of this instrument."""
        return (self.name, self.kind, self.labels) == (name, kind, labels)


def _made(
    kind: Kind,
    name: str,
    unit: str,
    labels: str,
    help: str,
    bounds: tuple[float, ...] = (),
    is_probed: bool = False,
) -> Instrument:
    return Instrument(
        PREFIX + name, kind, unit, tuple(labels.split()), help, bounds, is_probed
    )


OUTCOMES = _made(
    Kind.COUNTER,
    "task.outcomes",
    "{task}",
    "task queue outcome",
    "Deliveries by how they ended, each counted once.",
)
FAILURES = _made(
    Kind.COUNTER,
    "task.failures",
    "{task}",
    "task reason error_type",
    "Failed deliveries by reason and type of exception; their sum is that of the "
    "outcome failed.",
)
RUN = _made(
    Kind.HISTOGRAM,
    "task.run.duration",
    "s",
    "task outcome",
    "Seconds from the start of a run to its settlement.",
    (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
WAIT = _made(
    Kind.HISTOGRAM,
    "task.wait.duration",
    "s",
    "task queue",
    "Seconds from the moment when a task might run, which is that of its sending or its "
    "ETA, to the start of its run; of first deliveries.",
    (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200),
)
ATTEMPTS = _made(
    Kind.HISTOGRAM,
    "task.attempts",
    "{attempt}",
    "task",
    "Attempts that a task took to succeed, to be skipped or to fail for good.",
    (1, 2, 3, 5, 10, 20),
)
ACTIVE = _made(
    Kind.GAUGE, "task.active", "{task}", "task", "Tasks that run at this moment."
)
OLDEST_ACTIVE = _made(
    Kind.GAUGE,
    "task.oldest_active.age",
    "s",
    "task",
    "Age of the run that has gone on for longest.",
)
LAST_SUCCESS = _made(
    Kind.GAUGE,
    "task.last_success.time",
    "s",
    "task",
    "When a task succeeded last, as seconds since 1970.",
)
KEPT = _made(
    Kind.COUNTER,
    "failed_tasks.operations",
    "{task}",
    "operation task",
    "What workers did with failed tasks: kept, replay_succeeded, replay_failed.",
)
UNRESOLVED = _made(
    Kind.GAUGE,
    "failed_tasks.unresolved",
    "{task}",
    "failed_queue",
    "Failed tasks in the store that nobody has replayed or discarded.",
    is_probed=True,
)
UNRESOLVED_AGE = _made(
    Kind.GAUGE,
    "failed_tasks.oldest.age",
    "s",
    "",
    "Age of the oldest unresolved failed task in the store; 0 where there is none.",
    is_probed=True,
)
UNCOLLECTED = _made(
    Kind.GAUGE,
    "failed_tasks.messages",
    "{message}",
    "failed_queue",
    "Failed tasks that wait in their failed queue to be collected.",
    is_probed=True,
)
QUEUED = _made(
    Kind.GAUGE,
    "queue.messages",
    "{message}",
    "queue",
    "Messages that wait in a queue that this worker consumes; not those that workers "
    "hold.",
    is_probed=True,
)
PROBES = _made(
    Kind.GAUGE,
    "probe.success",
    "1",
    "probe",
    "1 if the last question was answered (store, queues, circuits, children); 0 means that "
    "nobody knows, and that what it asks for has no value.",
)
CHILD_EXITS = _made(
    Kind.COUNTER,
    "worker.child.exits",
    "{process}",
    "reason signal",
    "Children of the pool that ended: recycled, time_limit, memory, signal, exit or "
    "stopped.",
)
CHILD_MEMORY = _made(
    Kind.GAUGE,
    "worker.child.memory.usage",
    "By",
    "",
    "Own memory of the child that has most.",
    is_probed=True,
)
BUSY = _made(
    Kind.GAUGE, "worker.busy", "{slot}", "", "Children, or threads, that run a task."
)
SLOTS = _made(
    Kind.GAUGE, "worker.slots", "{slot}", "", "Tasks that this worker can run at once."
)
DRAINING = _made(
    Kind.GAUGE, "worker.draining", "1", "", "1 once the worker takes no new tasks."
)
STARTED = _made(
    Kind.GAUGE,
    "worker.start.time",
    "s",
    "version",
    "When this worker started, as seconds since 1970.",
)
CIRCUIT = _made(
    Kind.GAUGE,
    "circuit.state",
    "1",
    "circuit state",
    "1 for the state that a circuit is in (closed, open, half-open, or what an operator has "
    "forced: disabled, shadow), 0 for the others.",
    is_probed=True,
)
EVENTS = _made(
    Kind.COUNTER,
    "events",
    "{event}",
    "event",
    "What rooms told of, such as memory.recycled or idempotency.lease_lost.",
)
DROPPED = _made(
    Kind.COUNTER,
    "telemetry.dropped",
    "{item}",
    "signal",
    "What could not be told, or was not taken: metrics, spans, events, logs.",
)

ALL: tuple[Instrument, ...] = (
    *(OUTCOMES, FAILURES, RUN, WAIT, ATTEMPTS, ACTIVE, OLDEST_ACTIVE, LAST_SUCCESS),
    *(KEPT, UNRESOLVED, UNRESOLVED_AGE, UNCOLLECTED, QUEUED, PROBES),
    *(CHILD_EXITS, CHILD_MEMORY, BUSY, SLOTS, DRAINING, STARTED),
    *(CIRCUIT, EVENTS, DROPPED),
)

#: Outcomes after which a delivery's task comes again.
NOT_YET = frozenset({Outcome.RETRIED, Outcome.SNOOZED, Outcome.REQUEUED})

#: Outcomes that each task has from the start on, so that the first one is seen.
EXPECTED = (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.RETRIED)

#: Ends of children that are there from the start on, too.
EXPECTED_EXITS = (("recycled", ""), ("signal", "SIGKILL"), ("exit", ""))

#: Events of the rooms that are counted, from whichever process they come.
COUNTED_EVENTS = (
    "circuits.closed",
    "circuits.forced",
    "circuits.half_opened",
    "circuits.opened",
    "circuits.store_away",
    "delivery.given_up",
    "delivery.large_message_received",
    "delivery.publish_refused",
    "idempotency.finish_failed",
    "idempotency.lease_lost",
    "idempotency.unprotected",
    "memory.container_filled",
    "memory.ended",
    "memory.recycled",
    "memory.signalled",
    "memory.worker_over_limit",
    "messages.refused",
    "retries.exhausted",
    "retries.store_away",
    "sessions.leaked",
    "shelf.emptied",
    "shelf.filled",
)

#: Upper ends of the buckets of what tasks observe: any amount, in any unit.
BUSINESS_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50),
    *(100, 250, 500, 1_000, 2_500, 5_000, 10_000, 100_000, 1_000_000),
)


def business(name: str, kind: Kind, labels: tuple[str, ...]) -> Instrument:
    """The instrument of what the user's tasks count or observe under *name*."""
    bounds = BUSINESS_BOUNDS if kind is Kind.HISTOGRAM else ()
    what = "counted" if kind is Kind.COUNTER else "observed"
    return Instrument(name, kind, "", labels, f"What tasks {what}.", bounds)


def by_name() -> Mapping[str, Instrument]:
    """The instruments by their OpenTelemetry names."""
    return {instrument.name: instrument for instrument in ALL}
