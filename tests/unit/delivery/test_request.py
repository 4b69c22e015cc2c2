"""
A delivery is settled once, and acknowledged when what must be stored is stored.

With Celery's own Request class and app; what is left out is the pool and the broker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, signals
from celery.exceptions import (
    Ignore,
    InvalidTaskError,
    Reject,
    Retry,
    TimeLimitExceeded,
    WorkerLostError,
)
from celery.worker.request import Request
from kombu.message import Message
from unit.specimens import a_message, fresh_name

from celery_resilience import ResilientTask, Snooze
from celery_resilience.crashes.gate import Gate
from celery_resilience.crashes.judge import CrashJudge
from celery_resilience.delivery.deliveries import Deliveries
from celery_resilience.delivery.facts import FactsChannel
from celery_resilience.delivery.outbox import Outbox
from celery_resilience.delivery.request import build_request_class
from celery_resilience.errors import (
    BrokerUnavailable,
    CircuitSnooze,
    DropDelivery,
    SendAgain,
    TooManyCrashes,
)
from celery_resilience.events import observe
from celery_resilience.failure import describe
from celery_resilience.message import HEADER, OriginalMessage, foreign_message
from celery_resilience.outcome import EVENTS, Outcome, Settlement


class Broker:
    """Takes messages, or is away."""

    def __init__(self) -> None:
        self.taken: list[OriginalMessage] = []
        self.is_away = False

    def publish(self, message: OriginalMessage, *, declare: bool = False) -> None:
        if self.is_away:
            raise BrokerUnavailable("away")
        self.taken.append(message)


class Keeps:
    """Wants an envelope for every settlement that it is asked about."""

    def __init__(self) -> None:
        self.asked: list[Settlement] = []

    def message_for(
        self, settlement: Settlement, original: OriginalMessage
    ) -> OriginalMessage | None:
        self.asked.append(settlement)
        return foreign_message(b"envelope", "fq")


class Worker:
    """The main process of a worker, without its pool and consumer."""

    def __init__(self, **options: Any) -> None:
        self.app = Celery(
            fresh_name("unit"), set_as_current=False, backend="cache+memory://"
        )
        self.app.conf.update(options)

        @self.app.task(
            base=ResilientTask, name="shop.ship", redact=["card"], shared=False
        )
        def ship(order: int, card: str = "") -> None: ...

        self.task = self.app.tasks["shop.ship"]
        self.broker, self.keeps = Broker(), Keeps()
        self.facts = FactsChannel()
        self.now = 1_000.0
        self.deliveries = Deliveries(
            worker="celery@unit",
            outbox=Outbox(self.broker, clock=lambda: self.now),
            facts=self.facts,
            keeps=self.keeps,
            crashes=CrashJudge(max_crashes=3, window_s=100, clock=lambda: self.now),
            gate=Gate(lambda request: None),
        )
        self.request_class = build_request_class(Request, self.deliveries)
        self.acks: list[str] = []

    def deliver(
        self, body: Any = None, *, redelivered: bool = False, **headers: Any
    ) -> Any:
        """A delivery of the task, as the consumer makes a request of it."""
        if body is None:
            body = [[7], {"card": "4111-1111"}, {"chain": None, "chord": None}]
        message = Message(
            body=json.dumps(body).encode(),
            content_type="application/json",
            content_encoding="utf-8",
            accept={"application/json"},
            headers={**a_message(task_id=fresh_name("task")).headers, **headers},
            properties={},
            delivery_info={
                "exchange": "",
                "routing_key": "shop",
                "redelivered": redelivered,
            },
        )
        return self.request_class(
            message,
            app=self.app,
            task=self.task,
            on_ack=lambda *_: self.acks.append("ack"),
            on_reject=lambda *a: self.acks.append("requeue" if a[2] else "reject"),
        )

    @property
    def outcomes(self) -> dict[Outcome, int]:
        return dict(self.deliveries.counts)


def failed_with(exc: BaseException) -> ExceptionInfo:
    """What a pool hands over for a run that raised."""
    try:
        raise exc
    except BaseException:
        return ExceptionInfo()


@pytest.fixture(params=[True, False], ids=["late", "early"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker whose task acknowledges late, and one whose task does so early."""
    worker = Worker(task_acks_late=request.param)
    yield worker
    worker.facts.close()


@pytest.fixture
def late() -> Iterator[Worker]:
    """A worker whose task acknowledges late."""
    worker = Worker(task_acks_late=True)
    yield worker
    worker.facts.close()


@pytest.fixture
def told() -> Iterator[list[BaseException]]:
    """What the task_failure signal tells."""
    heard: list[BaseException] = []

    def receiver(exception: Any = None, **_: Any) -> None:
        heard.append(exception)

    signals.task_failure.connect(receiver)
    yield heard
    signals.task_failure.disconnect(receiver)


# --- stored, then acknowledged --------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda request: request.acknowledge(), "ack"),
        (lambda request: request.reject(), "reject"),
        (lambda request: request.reject(requeue=True), "requeue"),
    ],
)
def test_no_ack_before_the_envelope_is_stored(
    late: Worker, end: Callable[[Any], None], how: str
) -> None:
    """Whatever Celery asks for waits until the broker has the envelope."""
    late.broker.is_away = True
    request = late.deliver()
    request.on_failure(failed_with(ValueError("x")), return_ok=True)
    late.acks.clear()

    end(request)
    assert late.acks == []
    assert late.deliveries.held == {request.message}
    late.broker.is_away = False
    late.deliveries.outbox.reconnected()

    assert [message.body for message in late.broker.taken] == [b"envelope"]
    assert late.acks == [how]
    assert late.deliveries.held == set()


def test_an_ack_is_not_lost_between_two_threads(late: Worker) -> None:
    """The timer stores the envelope just as the pool's thread asks for the ack."""
    late.broker.is_away = True
    request = late.deliver()

    class Storing(type(request)):  # type: ignore[misc]
        """Lets the timer be the first after each look at `_is_held`."""

        @property
        def _is_held(self) -> bool:
            was_held = bool(self.__dict__["held"])
            if was_held and "stored" not in self.__dict__:
                self.__dict__["stored"] = True
                late.broker.is_away = False
                timer = Thread(target=late.deliveries.outbox.reconnected)
                timer.start()
                timer.join(10)
            return was_held

        @_is_held.setter
        def _is_held(self, held: bool) -> None:
            self.__dict__["held"] = held

    request.__class__ = Storing
    request.on_failure(failed_with(ValueError("x")), return_ok=True)

    assert late.acks == ["ack"]


def test_a_stored_failure_is_acknowledged_at_once(late: Worker) -> None:
    """Stored first: the ack finds the envelope there."""
    order: list[str] = []
    publish = late.broker.publish
    late.broker.publish = lambda message, **_: (  # type: ignore[method-assign]
        order.append("stored") or publish(message)  # type: ignore[func-returns-value]
    )
    request = late.deliver()
    request._on_ack = lambda *_: order.append("ack")

    request.on_failure(failed_with(ValueError("x")), return_ok=True)

    assert order == ["stored", "ack"]


def test_what_the_broker_delivers_again_has_no_copy(worker: Worker) -> None:
    """The copy would run beside it; but one that was acknowledged early is gone."""
    request = worker.deliver()
    is_late = worker.task.acks_late
    if not is_late:
        request.acknowledge()

    worker.deliveries.given_back()
    request.on_failure(failed_with(Snooze(5)), return_ok=True)

    assert len(worker.broker.taken) == (0 if is_late else 1)
    assert worker.outcomes == {Outcome.SNOOZED: 1}


def test_a_message_is_acknowledged_once(late: Worker) -> None:
    """Celery asks again; the broker would close the channel."""
    request = late.deliver()

    for _ in range(3):
        request.acknowledge()
    request.reject()

    assert late.acks == ["ack"]


def test_what_was_acknowledged_early_is_said_so(worker: Worker) -> None:
    """The outbox is then the last to hold it."""
    worker.broker.is_away = True
    request = worker.deliver()
    is_late = worker.task.acks_late
    if not is_late:
        request.acknowledge()

    request.on_failure(failed_with(ValueError("x")), return_ok=True)

    (item,) = worker.deliveries.outbox._held
    assert item.acknowledged is not is_late
    assert item.what == f"shop.ship[{request.id}]"
    assert item.keep is True


# --- one answer -----------------------------------------------------------------------


def test_the_first_answer_wins(late: Worker) -> None:
    """A hard limit is reported twice, a lost child after its result."""
    request = late.deliver()

    request.on_failure(failed_with(ValueError("first")), return_ok=True)
    request.on_failure(failed_with(KeyError("second")), return_ok=True)
    request.on_failure(failed_with(WorkerLostError("third")))
    request.on_timeout(False, 5)
    request.succeeded()
    request.dropped()

    assert late.outcomes == {Outcome.FAILED: 1}
    assert [s.failure.message for s in late.keeps.asked if s.failure] == ["first"]
    assert len(late.broker.taken) == 1
    assert request.settled_as is Outcome.FAILED


def test_two_threads_have_one_answer(late: Worker) -> None:
    """A result and a timeout come at the same moment."""
    for _ in range(30):
        request = late.deliver()
        start = Barrier(2)

        def answer(how: Callable[[], None], start: Barrier = start) -> None:
            start.wait()
            how()

        threads = [
            Thread(target=answer, args=(how,))
            for how in (request.succeeded, request.dropped)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert sum(late.outcomes.values()) == late.deliveries.received == 30


def test_every_delivery_is_counted(late: Worker) -> None:
    """Received when it arrives, by outcome when it ends."""
    requests = [late.deliver() for _ in range(3)]
    assert late.deliveries.received == 3
    assert late.outcomes == {}

    requests[0].succeeded()
    requests[1].dropped()
    requests[2].on_failure(failed_with(ValueError()), return_ok=True)

    assert late.outcomes == {
        Outcome.SUCCEEDED: 1,
        Outcome.REQUEUED: 1,
        Outcome.FAILED: 1,
    }


# --- what each end is -----------------------------------------------------------------

MARKED = {HEADER: {"crashes": 1}}

ENDS: list[tuple[str, BaseException, Outcome, str | None]] = [
    ("reported", ValueError("x"), Outcome.FAILED, "exception"),
    ("reported", MemoryError("x"), Outcome.FAILED, "exception"),
    ("reported", TooManyCrashes("x", 3), Outcome.FAILED, "worker_lost"),
    ("unreported", ValueError("x"), Outcome.FAILED, "exception"),
    ("unreported", SystemExit(3), Outcome.FAILED, "exception"),
    ("unreported", KeyboardInterrupt(), Outcome.FAILED, "exception"),
    ("unreported", TimeLimitExceeded(5), Outcome.FAILED, "hard_time_limit"),
    ("reported", Reject("no", requeue=False), Outcome.FAILED, "rejected"),
    ("reported", Reject("no", requeue=True), Outcome.REQUEUED, "rejected"),
    ("reported", Ignore(), Outcome.SKIPPED, "ignored"),
    ("reported", DropDelivery("replay_duplicate"), Outcome.SKIPPED, "replay_duplicate"),
    ("reported", Retry("later", when=5), Outcome.RETRIED, None),
    ("reported", Snooze(30, "busy"), Outcome.SNOOZED, "busy"),
    ("reported", SendAgain("suspect", 0, {"alone": True}), Outcome.REQUEUED, "suspect"),
]


@pytest.mark.parametrize(
    ("how", "exc", "outcome", "reason"),
    ENDS,
    ids=[f"{how}-{type(exc).__name__}-{reason}" for how, exc, _, reason in ENDS],
)
def test_each_end_of_a_run(
    worker: Worker, how: str, exc: BaseException, outcome: Outcome, reason: str | None
) -> None:
    """Has one outcome and reason; the message is settled with the broker once."""
    heard: list[Settlement] = []
    stop = observe(EVENTS[outcome], lambda settlement: heard.append(settlement))
    request = worker.deliver()
    if not worker.task.acks_late:
        request.acknowledge()

    request.on_failure(failed_with(exc), return_ok=how == "reported")
    stop()

    assert worker.outcomes == {outcome: 1}
    assert [(s.outcome, s.reason) for s in heard] == [(outcome, reason)]
    assert len(worker.acks) == 1
    assert not worker.deliveries._open


def test_a_failure_is_told_with_its_redacted_call(late: Worker) -> None:
    """Positional by name, secrets masked, in message and traceback too."""
    request = late.deliver(
        [[7], {"card": "4111-1111"}, {"chain": [{}, {}], "chord": {"task": "t"}}],
        retries=2,
        parent_id="p",
    )

    request.on_failure(failed_with(ValueError("bad 4111-1111")), return_ok=True)

    (settlement,) = late.keeps.asked
    assert (settlement.args, settlement.kwargs) == ("(7,)", "{'card': '***'}")
    assert settlement.arguments == {"order": "7", "card": "'***'"}
    assert settlement.failure is not None
    assert settlement.failure.message == "bad ***"
    assert "4111-1111" not in settlement.failure.traceback
    assert "ValueError: bad ***" in settlement.failure.traceback
    assert (settlement.attempt, settlement.parent_id) == (3, "p")
    assert (settlement.chain_length, settlement.in_chord) == (2, True)
    assert (settlement.queue, settlement.worker) == ("shop", "celery@unit")


def test_the_childs_facts_describe_the_failure(late: Worker) -> None:
    """It has the true exception, and knows that the retries were spent."""
    request = late.deliver()
    late.facts.send(
        request.id,
        {
            "exception": "shop.NoStock",
            "message": "none",
            "fingerprint": "f",
            "reason": "retries_exhausted",
        },
    )

    request.on_failure(failed_with(ValueError("a wrapper")), return_ok=True)

    (settlement,) = late.keeps.asked
    assert settlement.reason == "retries_exhausted"
    assert settlement.failure is not None
    assert settlement.failure.exception == "shop.NoStock"


def test_the_childs_skip_is_a_skip(late: Worker) -> None:
    """Celery stores it as a success."""
    request = late.deliver(redelivered=True)
    late.facts.send(request.id, {"skipped": "nothing to do"})

    request.succeeded()

    assert [(s.outcome, s.reason) for s in late.keeps.asked] == [
        (Outcome.SKIPPED, "nothing to do")
    ]


LONG_REASON = f"{'x' * 490} card 4111-1111 {'y' * 100_000}"


def heard_reason(outcome: Outcome, end: Callable[[], None]) -> str:
    """What is told of a delivery that ends."""
    heard: list[Settlement] = []
    stop = observe(EVENTS[outcome], lambda settlement: heard.append(settlement))
    end()
    stop()
    (settlement,) = heard
    assert settlement.reason is not None
    assert "4111" not in repr(settlement)
    return settlement.reason


@pytest.mark.parametrize("how", ["skip", "snooze"])
def test_a_bodys_reason_is_masked_and_cut(late: Worker, how: str) -> None:
    """It may quote an argument that is hidden, and be of any length."""

    def reason(words: str) -> str:
        request = late.deliver()
        if how == "skip":
            late.facts.send(request.id, {"skipped": words})
            return heard_reason(Outcome.SKIPPED, request.succeeded)
        failed = failed_with(Snooze(30, words))
        return heard_reason(
            Outcome.SNOOZED, lambda: request.on_failure(failed, return_ok=True)
        )

    assert reason("card 4111-1111 is busy") == "card *** is busy"
    shown = reason(LONG_REASON)
    assert shown.startswith(f"{'x' * 490} card ***")
    assert len(shown) < 600


def test_an_ordinary_success_asks_nobody(late: Worker) -> None:
    """No envelope, no report, no settlement that nobody hears."""
    late.deliver().succeeded()

    assert late.keeps.asked == []
    assert late.broker.taken == []
    assert late.outcomes == {Outcome.SUCCEEDED: 1}


@pytest.mark.parametrize("past", [{"redelivered": True}, MARKED])
def test_a_success_with_a_past_is_reported(late: Worker, past: dict[str, Any]) -> None:
    """An earlier capture of it may be void now (races.md, 1)."""
    late.deliver(**past).succeeded()

    assert [s.outcome for s in late.keeps.asked] == [Outcome.SUCCEEDED]
    assert len(late.broker.taken) == 1


@pytest.mark.parametrize(
    ("exc", "how"),
    [
        (Reject("no", requeue=False), "reject"),
        (TimeLimitExceeded(5), "ack"),
        (SystemExit(3), "ack"),
    ],
)
def test_a_result_backend_that_is_away_leaves_no_message_unsettled(
    late: Worker, monkeypatch: pytest.MonkeyPatch, exc: BaseException, how: str
) -> None:
    """The failure is kept; delivered again it would be a second one."""

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(late.task.backend, "mark_as_failure", away)
    late.deliver().on_failure(failed_with(exc))

    assert len(late.keeps.asked) == 1
    assert late.acks == [how]


def test_celery_does_not_see_a_memory_error(
    late: Worker, told: list[BaseException]
) -> None:
    """It would end the worker."""
    late.deliver().on_failure(failed_with(MemoryError("x")), return_ok=False)

    assert [type(exc).__name__ for exc in told] == ["TaskRanOutOfMemory"]
    (settlement,) = late.keeps.asked
    assert settlement.failure is not None
    assert settlement.failure.exception == "MemoryError"


def test_a_snooze_is_sent_again_before_the_ack(late: Worker) -> None:
    """Later, with its retries unspent, and counted."""
    late.broker.is_away = True
    request = late.deliver(retries=2)

    request.on_failure(failed_with(Snooze(30)), return_ok=True)
    assert late.acks == []
    late.broker.is_away = False
    late.deliveries.outbox.reconnected()

    (copy,) = late.broker.taken
    assert copy.marks == {"snoozes": 1, "sent": copy.marks["sent"]}
    assert copy.headers["retries"] == 2
    assert copy.headers["eta"] is not None
    assert copy.queue == "shop"
    assert copy.body == request.message.body
    assert late.acks == ["ack"]


def test_a_snooze_of_a_run_that_a_budget_has_paid_for_pays_no_more(
    late: Worker,
) -> None:
    """Whatever the snooze is for: the mark by which the next run would pay is gone."""
    request = late.deliver(resilience={"retry_wait": {"budget": "bank"}})
    late.facts.send(request.id, {"budget_paid": True})

    request.on_failure(failed_with(Snooze(30)), return_ok=True)

    (copy,) = late.broker.taken
    assert "retry_wait" not in copy.marks


def test_a_lost_child_of_a_late_acked_task_runs_again(late: Worker) -> None:
    """Sent again with its count, before the ack; no failure is kept."""
    request = late.deliver()

    request.on_failure(failed_with(WorkerLostError("signal 9")))

    (copy,) = late.broker.taken
    assert copy.marks["crashes"] == 1
    assert late.outcomes == {Outcome.REQUEUED: 1}
    assert late.keeps.asked == []
    assert late.acks == ["ack"]


@pytest.mark.parametrize(
    "end",
    [Retry("later", when=5), Ignore(), Reject("no", requeue=True), Snooze(1)],
    ids=lambda end: type(end).__name__,
)
def test_what_a_child_told_of_one_run_is_not_for_the_next(
    late: Worker, end: BaseException
) -> None:
    """An attempt that ends well leaves no count for one that dies in that child."""
    first = late.deliver(id="same")
    late.facts._unclaimed[5, "same"] = {"runs_before": 1}
    first.worker_pid = 5
    first.on_failure(failed_with(end), return_ok=True)
    late.broker.taken.clear()
    second = late.deliver(id="same")
    second.worker_pid = 5

    second.on_failure(failed_with(WorkerLostError("signal 9")))

    (copy,) = late.broker.taken
    assert copy.marks["crashes"] == 1


def test_a_requeue_that_the_task_asked_for_is_no_death(late: Worker) -> None:
    """Where redeliveries are counted on the message, the count begins anew."""
    request = late.deliver(**{HEADER: {"redeliveries": 2, "alone": True}})

    request.on_failure(failed_with(Reject("again", requeue=True)), return_ok=True)

    (copy,) = late.broker.taken
    assert copy.marks == {"sent": copy.marks["sent"]}
    assert late.outcomes == {Outcome.REQUEUED: 1}
    assert late.acks == ["ack"]


def test_a_lost_child_at_the_limit_is_a_failure(late: Worker) -> None:
    """With what it died of, and where."""
    request = late.deliver(**{HEADER: {"crashes": 2, "crashed_at": 999.0}})

    request.on_failure(failed_with(WorkerLostError("signal 9 (SIGKILL) Job: 5.")))

    (settlement,) = late.keeps.asked
    assert (settlement.outcome, settlement.reason) == (Outcome.FAILED, "worker_lost")
    assert settlement.failure is not None
    assert settlement.failure.message.startswith("signal 9 (SIGKILL) (host ")
    assert late.acks == ["ack"]
    assert late.app.AsyncResult(request.id).state == "FAILURE"


def test_a_lost_child_of_an_early_acked_task_is_a_failure() -> None:
    """At once: its message is gone."""
    worker = Worker(task_acks_late=False)
    request = worker.deliver()
    request.acknowledge()

    request.on_failure(failed_with(WorkerLostError("signal 9")))
    worker.facts.close()

    assert [s.reason for s in worker.keeps.asked] == ["worker_lost"]
    assert worker.acks == ["ack"]


def test_a_hard_limit_is_one_failure(late: Worker, told: list[BaseException]) -> None:
    """The pool reports it to on_failure, and then to on_timeout."""
    request = late.deliver()

    request.on_failure(failed_with(TimeLimitExceeded(5)))
    request.on_timeout(False, 5)

    assert [type(exc) for exc in told] == [TimeLimitExceeded]

    (settlement,) = late.keeps.asked
    assert settlement.reason == "hard_time_limit"
    assert settlement.failure is not None
    assert settlement.failure.message == "the run passed its hard time limit of 5 s"
    assert late.acks == ["ack"]


def test_a_hard_limit_is_told_as_one_after_a_failure_too(late: Worker) -> None:
    """Facts that a run had sent before it was cut off are not what it ended with."""
    request = late.deliver()
    late.facts.send(request.id, describe(ValueError("before the limit")))

    request.on_failure(failed_with(TimeLimitExceeded(5)))

    (settlement,) = late.keeps.asked
    assert settlement.failure is not None
    assert settlement.failure.message == "the run passed its hard time limit of 5 s"


def test_the_gevent_pools_hard_limit_is_one_too(late: Worker) -> None:
    """It comes to on_timeout only."""
    request = late.deliver()

    request.on_timeout(False, 5)

    assert [s.reason for s in late.keeps.asked] == ["hard_time_limit"]


def test_a_soft_limit_settles_nothing(late: Worker) -> None:
    """The body may still catch it."""
    request = late.deliver()

    request.on_timeout(True, 5)

    assert request.settled_as is None


def test_a_hard_limit_that_is_not_acknowledged_is_a_crash() -> None:
    """With `acks_on_timeout = False` Celery requeues it for ever."""
    worker = Worker(task_acks_late=True, task_acks_on_failure_or_timeout=False)
    worker.task.acks_on_timeout = False
    request = worker.deliver()

    request.on_failure(failed_with(TimeLimitExceeded(5)))
    worker.facts.close()

    assert worker.outcomes == {Outcome.REQUEUED: 1}
    assert worker.broker.taken[0].marks["crashes"] == 1


def test_a_dropped_message_is_requeued_and_leaves_the_table(late: Worker) -> None:
    """The broker delivers it again; nobody acknowledges it here."""
    request = late.deliver()

    request.dropped()

    assert late.outcomes == {Outcome.REQUEUED: 1}
    assert late.acks == []
    assert late.broker.taken == []


@pytest.mark.parametrize(
    "body", [[7, {}, {}], [[], [1], {}], [[], None, {}], [[], {}, "x"]]
)
def test_a_malformed_call_is_no_request(late: Worker, body: Any) -> None:
    """The consumer keeps it; it is not counted as a delivery of a task."""
    with pytest.raises(InvalidTaskError):
        late.deliver(body)

    assert late.deliveries.received == 0
    assert not late.deliveries._open


@pytest.mark.parametrize(
    ("marks", "alone"),
    [
        ({HEADER: {"alone": True}}, True),
        ({HEADER: {"crashes": 1}}, False),
        ({HEADER: "garbage"}, False),
        ({}, False),
    ],
)
def test_a_suspect_is_known_by_its_mark(
    late: Worker, marks: dict[str, Any], alone: bool
) -> None:
    """Garbage is none."""
    assert late.deliver(**marks).runs_alone is alone


def test_a_request_class_is_built_once_on_the_apps_own(late: Worker) -> None:
    """Of a worker started twice, ours is not built on ours."""

    class Own(Request):
        is_own = True

    first = build_request_class(Own, late.deliveries)
    second = build_request_class(first, late.deliveries)

    assert issubclass(second, Own)
    assert [cls.__name__ for cls in second.__mro__].count("ResilientRequest") == 2
    assert not issubclass(second, first)


def test_a_chain_that_is_no_list_does_not_stop_the_settlement(late: Worker) -> None:
    """`{"chain": 5}` decodes; the failure must be kept, and the worker live."""
    request = late.deliver([[7], {}, {"chain": 5}])

    request.on_failure(failed_with(TypeError("chain")), return_ok=True)

    assert len(late.keeps.asked) == 1


def test_a_garbled_mark_does_not_stop_a_snooze(late: Worker) -> None:
    """Anybody may write a header named resilience."""
    request = late.deliver(**{HEADER: {"snoozes": "many"}})

    request.on_failure(failed_with(Snooze(1)), return_ok=True)

    assert late.outcomes == {Outcome.SNOOZED: 1}


def test_a_garbled_mark_does_not_stop_a_verdict(late: Worker) -> None:
    """The message must be settled all the same."""
    request = late.deliver(**{HEADER: {"crashes": "many"}})

    request.on_failure(failed_with(WorkerLostError("signal 9")))

    assert sum(late.outcomes.values()) == 1


# --- the marks of snoozes ---------------------------------------------------------------


def marks_after(worker: Worker, exc: BaseException, **marks: Any) -> dict[str, Any]:
    """Those of the copy of a message with *marks* whose run ended in *exc*."""
    request = worker.deliver(**{HEADER: marks})
    request.on_failure(failed_with(exc), return_ok=True)
    found = worker.broker.taken[-1].marks
    assert found.pop("sent")
    return found


def test_a_snooze_of_a_circuit_is_known_by_its_age(worker: Worker) -> None:
    """Not counted with the task's own; since when it waits stays as it was."""
    first = marks_after(worker, CircuitSnooze(5, "bank", 900.0))
    assert first == {"snoozes": 0, "waits_since": 900.0}
    again = marks_after(
        worker, CircuitSnooze(5, "bank", 900.0), **first, redeliveries=2
    )
    assert again == first
    after_own = marks_after(worker, CircuitSnooze(5, "bank", 950.0), snoozes=4)
    assert after_own == {"snoozes": 4, "waits_since": 950.0}


def test_a_snooze_of_the_tasks_own_ends_the_wait_for_a_circuit(worker: Worker) -> None:
    """It has run: the next wait begins anew."""
    marks = marks_after(worker, Snooze(5), snoozes=4, waits_since=900.0)

    assert marks == {"snoozes": 5}
