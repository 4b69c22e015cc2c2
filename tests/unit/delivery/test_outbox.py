"""What must be stored before its message is acknowledged goes out here, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import a_message

from celery_resilience.delivery import outbox as module
from celery_resilience.delivery.outbox import MAX_RETRY_S, RETRY_S, Outbox, Outgoing
from celery_resilience.errors import (
    BrokerUnavailable,
    NoRoute,
    PublishRefused,
)
from celery_resilience.events import observe
from celery_resilience.message import OriginalMessage


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


class Broker:
    """A publisher that refuses what it is told to refuse."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.tried: list[str] = []
        self.declared: list[str] = []
        self.is_away = False
        self.refused_queues: set[str] = set()
        self.on_publish: Callable[[], None] = lambda: None

    def publish(self, message: OriginalMessage, *, declare: bool = False) -> None:
        name = message.body.decode()
        self.tried.append(name)
        self.on_publish()
        if self.is_away:
            raise BrokerUnavailable("away")
        if message.queue in self.refused_queues:
            raise NoRoute(f"no {message.queue}")
        self.taken.append(name)
        if declare:
            self.declared.append(message.queue)


class Spool:
    """A spool in memory."""

    def __init__(self) -> None:
        self.kept: list[OriginalMessage] = []
        self.is_full = False

    def put(self, message: OriginalMessage) -> bool:
        if not self.is_full:
            self.kept.append(message)
        return not self.is_full

    def drain(self, publish: Callable[[OriginalMessage], None]) -> int:
        taken, refused = 0, None
        for message in list(self.kept):
            try:
                publish(message)
            except PublishRefused as exc:
                refused = exc
                continue
            self.kept.remove(message)
            taken += 1
        if refused is not None:
            raise refused
        return taken


class Desk:
    """An outbox with all that surrounds it."""

    def __init__(self, *, has_spool: bool = False) -> None:
        self.clock = Clock()
        self.broker = Broker()
        self.spool = Spool() if has_spool else None
        self.outbox = Outbox(self.broker, clock=self.clock, spool=self.spool)
        self.acked: list[str] = []

    def put(self, name: str, queue: str = "q", **options: Any) -> bool:
        """Put something that is acknowledged once it is stored."""
        return self.outbox.put(
            Outgoing(
                message=a_message(body=name.encode(), queue=queue),
                then=lambda: self.acked.append(name),
                what=f"the failure of {name}",
                **options,
            )
        )

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the worker's timer fire once."""
        self.clock.now += seconds
        self.outbox.tick()


@pytest.fixture
def desk() -> Desk:
    """Without a spool."""
    return Desk()


@pytest.fixture
def spooled() -> Desk:
    """With a spool."""
    return Desk(has_spool=True)


# --- while the broker is there --------------------------------------------------------


def test_what_is_stored_is_acknowledged(desk: Desk) -> None:
    """At once, and never before."""
    desk.broker.on_publish = lambda: desk.acked.append("published")

    assert desk.put("a") is True
    assert desk.acked == ["published", "a"]
    assert desk.outbox.held == 0


def test_only_an_envelopes_queue_is_made(desk: Desk) -> None:
    """A copy goes to a queue that is there, or nowhere."""
    desk.put("envelope", "shop.failed", keep=True)
    desk.put("copy", "shop")

    assert desk.broker.declared == ["shop.failed"]


# --- while it is away -----------------------------------------------------------------


def test_what_is_not_stored_is_not_acknowledged(desk: Desk) -> None:
    """Its message stays with the broker."""
    desk.broker.is_away = True

    assert desk.put("a") is False
    assert desk.acked == []
    assert desk.outbox.held == 1


def test_only_the_first_refusal_costs_its_time(desk: Desk) -> None:
    """Everything after it waits, of whatever queue."""
    desk.broker.is_away = True

    for number in range(50):
        desk.put(str(number), queue=f"q{number % 3}")

    assert desk.broker.tried == ["0"]
    assert desk.outbox.held == 50


def test_when_it_is_back_everything_goes_in_order(desk: Desk) -> None:
    """Each is acknowledged as it is stored."""
    desk.broker.is_away = True
    names = [str(number) for number in range(20)]
    for name in names:
        desk.put(name, queue=f"q{int(name) % 3}")
    desk.broker.is_away = False

    desk.pass_time(RETRY_S)

    assert desk.broker.taken == names
    assert desk.acked == names
    assert desk.outbox.held == 0


def test_what_comes_later_does_not_overtake(desk: Desk) -> None:
    """The older ones are tried first, as soon as it may be tried."""
    desk.broker.is_away = True
    desk.put("a")
    desk.put("b")
    desk.broker.is_away = False
    desk.clock.now += RETRY_S

    assert desk.put("c") is True
    assert desk.broker.taken == ["a", "b", "c"]


def test_what_comes_as_the_wait_ends_does_not_overtake(desk: Desk) -> None:
    """The wait may end between looking at what waits and publishing."""
    desk.broker.is_away = True
    desk.put("a")
    desk.broker.is_away = False
    desk.clock.now, desk.clock.step_s = 1_000.0 + RETRY_S - 0.003, 0.002

    desk.put("b")
    desk.outbox.reconnected()

    assert desk.broker.taken == ["a", "b"]


def test_the_wait_is_doubled_up_to_a_cap(desk: Desk) -> None:
    """One try at each end of a wait, and none in between."""
    desk.broker.is_away = True
    desk.put("a")
    times = []
    for _ in range(200):
        before = len(desk.broker.tried)
        desk.pass_time(RETRY_S)
        if len(desk.broker.tried) > before:
            times.append(desk.clock.now - 1_000.0)

    waits = [
        after - before for before, after in zip([0.0, *times], times, strict=False)
    ]
    assert waits[:8] == [1, 2, 4, 8, 16, MAX_RETRY_S, MAX_RETRY_S, MAX_RETRY_S]


def test_a_success_resets_the_wait(desk: Desk) -> None:
    """The next outage begins with a short one."""
    desk.broker.is_away = True
    desk.put("a")
    for _ in range(4):
        desk.pass_time(MAX_RETRY_S)
    desk.broker.is_away = False
    desk.pass_time(MAX_RETRY_S)
    desk.broker.is_away = True
    desk.put("b")
    desk.broker.is_away = False

    desk.pass_time(RETRY_S)

    assert desk.acked == ["a", "b"]


def test_a_new_connection_is_tried_at_once(desk: Desk) -> None:
    """Whatever the wait was."""
    desk.broker.is_away = True
    desk.put("a")
    desk.pass_time(RETRY_S)
    desk.broker.is_away = False

    desk.outbox.reconnected()

    assert desk.acked == ["a"]


def test_a_tick_with_nothing_to_do_asks_nobody(desk: Desk) -> None:
    """It is called every second for the worker's whole life."""
    desk.pass_time(100)

    assert desk.broker.tried == []


def test_every_refusal_is_told(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """In the log and as an event, with the queue and why."""
    heard: list[Any] = []
    stop = observe("delivery.publish_refused", lambda **facts: heard.append(facts))
    desk.broker.is_away = True

    with caplog.at_level(logging.WARNING, "celery_resilience.delivery"):
        desk.put("a")
        desk.put("b")
    stop()

    assert heard == [{"queue": "q", "error": "away"}]
    (message,) = caplog.messages
    assert "the failure of a" in message
    assert "trying again in 1 s: away" in message


# --- while one queue refuses ----------------------------------------------------------


def test_a_queue_that_refuses_does_not_hold_up_another(desk: Desk) -> None:
    """NO_ROUTE or a full queue is about that queue."""
    desk.broker.refused_queues = {"full"}

    desk.put("a", "full")
    desk.put("b", "q")
    desk.put("c", "full")
    desk.put("d", "q")

    assert desk.acked == ["b", "d"]
    assert desk.broker.tried == ["a", "b", "d"]
    assert desk.outbox.held == 2


def test_a_queue_that_refuses_is_tried_again_on_its_own_time(desk: Desk) -> None:
    """With a wait of its own, that a success of another does not reset."""
    desk.broker.refused_queues = {"full"}
    desk.put("a", "full")
    for number in range(10):
        desk.put(f"b{number}", "q")
    desk.pass_time(RETRY_S / 2)
    assert desk.broker.tried.count("a") == 1

    desk.pass_time(RETRY_S)
    assert desk.broker.tried.count("a") == 2
    desk.broker.refused_queues = set()
    desk.pass_time(2 * RETRY_S)

    assert "a" in desk.acked


def test_a_message_that_is_never_taken_does_not_hold_up_its_own_queue(
    desk: Desk,
) -> None:
    """One that is too large goes last in line."""
    refuse = {"huge"}

    def check() -> None:
        if desk.broker.tried[-1] in refuse:
            raise PublishRefused("too large")

    desk.broker.on_publish = check
    desk.put("huge")
    desk.put("a")
    desk.put("b")
    for _ in range(6):
        desk.pass_time(MAX_RETRY_S)

    assert desk.acked == ["a", "b"]
    assert desk.outbox.held == 1


# --- the spool ------------------------------------------------------------------------


def test_an_envelope_is_spooled_while_the_broker_is_away(spooled: Desk) -> None:
    """And acknowledged, for it is on the disk."""
    spooled.broker.is_away = True

    assert spooled.put("a", keep=True) is True
    assert spooled.put("b", keep=True) is True
    assert spooled.acked == ["a", "b"]
    assert spooled.broker.tried == ["a"]
    assert [message.body for message in spooled.spool.kept] == [b"a", b"b"]


def test_a_copy_is_never_spooled(spooled: Desk) -> None:
    """Nobody would run it but this host, when it comes back."""
    spooled.broker.is_away = True

    assert spooled.put("copy") is False
    assert spooled.acked == []
    assert spooled.spool.kept == []


def test_a_full_spool_holds_the_message(spooled: Desk) -> None:
    """Nothing more is acknowledged."""
    spooled.broker.is_away = True
    spooled.spool.is_full = True

    assert spooled.put("a", keep=True) is False
    assert spooled.acked == []
    assert spooled.outbox.held == 1


def test_the_spool_is_drained_when_the_broker_is_back(spooled: Desk) -> None:
    """Into queues that are made where they are missing; then it is left alone."""
    spooled.broker.is_away = True
    spooled.put("a", "fq", keep=True)
    spooled.put("b", "fq", keep=True)
    spooled.broker.is_away = False

    spooled.pass_time(RETRY_S)
    spooled.pass_time(RETRY_S)

    assert spooled.broker.taken == ["a", "b"]
    assert spooled.broker.declared == ["fq", "fq"]
    assert spooled.acked == ["a", "b"]
    assert spooled.spool.kept == []


def test_what_an_earlier_worker_spooled_is_drained(spooled: Desk) -> None:
    """At the first tick, whether or not this one has spooled."""
    spooled.spool.put(a_message(body=b"old", queue="fq"))

    spooled.outbox.tick()

    assert spooled.broker.taken == ["old"]


def test_a_broker_that_leaves_during_a_drain_is_waited_for(spooled: Desk) -> None:
    """One try for each wait, not one for each file."""
    for name in (b"a", b"b", b"c"):
        spooled.spool.put(a_message(body=name, queue="fq"))
    spooled.broker.is_away = True

    spooled.outbox.tick()
    spooled.pass_time(RETRY_S / 2)

    assert spooled.broker.tried == ["a"]
    assert len(spooled.spool.kept) == 3


# --- the end --------------------------------------------------------------------------


def test_what_was_acknowledged_early_is_told_at_the_end(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """This process is the last to hold it: all of it goes to the log, at CRITICAL."""
    heard: list[Any] = []
    stop = observe("delivery.given_up", lambda **facts: heard.append(facts))
    desk.broker.is_away = True
    desk.put("early", acknowledged=True)

    with caplog.at_level(logging.CRITICAL, "celery_resilience.delivery"):
        desk.outbox.close()
    stop()

    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.levelno == logging.CRITICAL
    text = record.getMessage()
    assert "LOST unless this line is kept: the failure of early" in text
    assert "body=b'early'" in text
    assert "'task': 'shop.ship'" in text
    assert heard == [{"queue": "q"}]
    assert desk.acked == []


def test_what_the_broker_still_has_is_dropped_at_the_end(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """It delivers it again; nothing is lost, so nothing is cried."""
    desk.broker.is_away = True
    desk.put("late")

    with caplog.at_level(logging.ERROR, "celery_resilience.delivery"):
        desk.outbox.close()

    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []
    assert desk.acked == []
    assert desk.outbox.held == 0


def test_too_many_held_messages_go_to_the_log(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest first, so that memory is bounded."""
    monkeypatch.setattr(module, "MAX_HELD", 3)
    desk.broker.is_away = True

    for number in range(5):
        desk.put(str(number), acknowledged=True)

    lost = [r.args[0] for r in caplog.records if r.levelno == logging.CRITICAL]
    assert lost == ["the failure of 0", "the failure of 1"]
    assert desk.outbox.held == 3


# --- threads and signal handlers ------------------------------------------------------


def test_a_signal_handler_that_interrupts_a_publish_waits(desk: Desk) -> None:
    """A cold stop cancels tasks inside its handler, half way through our publish."""
    interrupted = iter([True])

    def interrupt() -> None:
        if next(interrupted, False):
            assert desk.put("from the handler") is False
            desk.outbox.tick()

    desk.broker.on_publish = interrupt

    assert desk.put("a") is True
    assert desk.broker.tried == ["a"]
    desk.outbox.tick()
    assert desk.acked == ["a", "from the handler"]


def test_a_publisher_with_a_fault_leaves_the_outbox_usable(desk: Desk) -> None:
    """An error that nobody foresaw is raised, and the next one is stored."""

    def fail() -> None:
        desk.broker.on_publish = lambda: None
        raise ZeroDivisionError

    desk.broker.on_publish = fail

    with pytest.raises(ZeroDivisionError):
        desk.put("a")

    assert desk.put("b") is True


def test_what_is_remade_from_a_redelivery_is_dropped(desk: Desk) -> None:
    """But not what is the last that there is, nor an envelope."""
    desk.broker.is_away = True
    desk.put("envelope", keep=True)
    desk.put("copy", remade=True)
    desk.put("copy of an early-acked one", remade=True, acknowledged=True)
    desk.broker.is_away = False

    desk.outbox.given_back()
    desk.outbox.reconnected()

    assert desk.broker.taken == ["envelope", "copy of an early-acked one"]


def test_an_ack_that_fails_stops_nothing(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """Its channel may be closed; what waits behind it is stored all the same."""

    def fail() -> None:
        raise AttributeError("'NoneType' object has no attribute 'client'")

    desk.broker.is_away = True
    stale = Outgoing(message=a_message(body=b"stale"), then=fail, what="a stale one")
    desk.outbox.put(stale)
    desk.put("next")
    desk.broker.is_away = False

    desk.outbox.reconnected()

    assert desk.broker.taken == ["stale", "next"]
    assert desk.acked == ["next"]
    assert "after storing a stale one" in caplog.text


def test_many_threads_lose_and_double_nothing(desk: Desk) -> None:
    """Pools of threads settle from each of theirs."""
    desk.broker.is_away = True

    def work(start: int) -> None:
        for number in range(start, start + 50):
            desk.put(str(number), queue=f"q{number % 2}")

    threads = [Thread(target=work, args=(n * 50,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    desk.broker.is_away = False
    desk.outbox.reconnected()

    assert sorted(desk.acked, key=int) == [str(n) for n in range(200)]
    assert sorted(desk.broker.taken) == sorted(desk.acked)


events = st.sampled_from(
    ["put", "put", "away", "back", "refuse", "accept", "time", "tick"]
)


@given(st.lists(st.tuples(events, st.integers(0, 2)), max_size=40), st.booleans())
def test_everything_is_stored_once_in_the_end(
    story: list[tuple[str, int]], has_spool: bool
) -> None:
    """Whatever the broker does meanwhile: acknowledged only once it is stored."""
    desk = Desk(has_spool=has_spool)
    put: list[str] = []
    for number, (event, queue) in enumerate(story):
        if event == "put":
            put.append(str(number))
            desk.put(str(number), f"q{queue}", keep=bool(number % 2))
        elif event in ("away", "back"):
            desk.broker.is_away = event == "away"
        elif event == "refuse":
            desk.broker.refused_queues.add(f"q{queue}")
        elif event == "accept":
            desk.broker.refused_queues.discard(f"q{queue}")
        else:
            desk.pass_time(queue if event == "time" else 0)
        spooled = [m.body.decode() for m in desk.spool.kept] if desk.spool else []
        assert sorted(desk.acked) == sorted(set(desk.broker.taken) | set(spooled))
    desk.broker.is_away, desk.broker.refused_queues = False, set()
    for _ in range(3):
        desk.pass_time(MAX_RETRY_S)

    assert sorted(desk.acked) == sorted(put)
    assert sorted(desk.broker.taken) == sorted(put)
    assert desk.outbox.held == 0


def test_the_order_is_kept_however_long_it_is_away(desk: Desk) -> None:
    """A refusal of the broker is not the message's fault."""
    desk.broker.is_away = True
    for name in ("a", "b", "c"):
        desk.put(name)
    desk.pass_time(RETRY_S)
    desk.broker.is_away = False

    desk.pass_time(2 * RETRY_S)

    assert desk.acked == ["a", "b", "c"]


def test_the_end_tries_once_more(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """As its docstring says: the broker is back, and the envelope goes to the log."""
    desk.broker.is_away = True
    desk.put("early", acknowledged=True)
    desk.broker.is_away = False

    desk.outbox.close()

    assert desk.broker.taken == ["early"]
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_a_spooled_envelope_that_is_refused_holds_up_nobody(spooled: Desk) -> None:
    """Its queue is full; other queues' envelopes and copies wait up to 30 s for it."""
    spooled.spool.put(a_message(body=b"old", queue="full"))
    spooled.broker.refused_queues = {"full"}
    spooled.outbox.tick()

    assert spooled.put("copy", "q") is True


def test_a_spool_that_cannot_be_read_does_not_end_the_worker(spooled: Desk) -> None:
    """`reconnected` is called as the consumer starts."""

    def broken(publish: Any) -> int:
        raise PermissionError(13, "Permission denied")

    spooled.spool.drain = broken  # type: ignore[method-assign]

    spooled.outbox.reconnected()

    assert spooled.put("a") is True
