"""What the main process notes, counts and answers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import a_failure, a_settlement

from celery_resilience.events import emit
from celery_resilience.outcome import COUNTED, ENDED, EVENTS, Ended, Outcome, Reason
from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry import metrics as module
from celery_resilience.telemetry.business import RunCounts
from celery_resilience.telemetry.instruments import OTHER, Instrument
from celery_resilience.telemetry.metrics import Metrics
from celery_resilience.telemetry.series import MAX_TYPES, Labels, Reading, Series


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    """Of a worker with the tasks ship and charge; the clock stands at 1,000."""
    made = Metrics(["ship", "charge"], clock=lambda: 1_000.0)
    made.attach()
    yield made
    made.detach()


def reading(metrics: Metrics, instrument: Instrument) -> Reading:
    """What one instrument tells."""
    (found,) = (it for it in metrics.read() if it.instrument.name == instrument.name)
    return found


def numbers(metrics: Metrics, instrument: Instrument) -> dict[Labels, float]:
    """Its numbers, without those that are zero."""
    found = reading(metrics, instrument).numbers
    return {labels: number for labels, number in found.items() if number}


def end(outcome: Outcome, task: str = "ship", **more: Any) -> None:
    """A delivery ends."""
    emit(ENDED, ended=Ended(task, "q", outcome, **more))


def test_each_delivery_is_counted_once(metrics: Metrics) -> None:
    """By task, queue and outcome."""
    for outcome in (Outcome.SUCCEEDED, Outcome.SUCCEEDED, Outcome.RETRIED):
        end(outcome)
    end(Outcome.FAILED, "charge")

    assert numbers(metrics, i.OUTCOMES) == {
        ("ship", "q", "succeeded"): 2,
        ("ship", "q", "retried"): 1,
        ("charge", "q", "failed"): 1,
    }
    assert numbers(metrics, i.LAST_SUCCESS) == {("ship",): 1_000.0}


def test_a_task_that_nobody_registered_has_no_label_of_its_own(
    metrics: Metrics,
) -> None:
    """Whoever can send a message could make series for ever."""
    for number in range(3):
        end(Outcome.FAILED, f"made-up-{number}")

    assert numbers(metrics, i.OUTCOMES) == {(OTHER, "q", "failed"): 3}


def test_times_are_in_buckets_and_attempts_only_of_what_is_over(
    metrics: Metrics,
) -> None:
    """A retried attempt is not the last; what nobody knows is not put as 0."""
    end(Outcome.RETRIED, run_s=0.2)
    end(Outcome.SUCCEEDED, attempt=2, run_s=0.3, wait_s=7.0)
    end(Outcome.REVOKED)

    run = reading(metrics, i.RUN).histograms
    assert {labels: (it.count, it.sum) for labels, it in run.items()} == {
        ("ship", "retried"): (1, 0.2),
        ("ship", "succeeded"): (1, 0.3),
    }
    (wait,) = reading(metrics, i.WAIT).histograms.values()
    assert wait.counts[i.WAIT.bounds.index(15)] == wait.count == 1
    assert reading(metrics, i.ATTEMPTS).histograms[("ship",)].sum == 2


def test_a_failure_has_its_reason_and_type(metrics: Metrics) -> None:
    """The types of exceptions are bounded, for tasks make them up."""
    for number in range(MAX_TYPES + 5):
        failure = a_failure(exception=f"Error{number}")
        settlement = a_settlement(task="ship", reason=Reason.EXCEPTION, failure=failure)
        emit(EVENTS[Outcome.FAILED], settlement=settlement)

    found = numbers(metrics, i.FAILURES)
    assert found[("ship", "exception", "Error0")] == 1
    assert found[("ship", "exception", OTHER)] == 5
    assert sum(found.values()) == MAX_TYPES + 5


def test_what_is_kept_and_replayed_is_counted(metrics: Metrics) -> None:
    """A replay that is revoked is neither a success nor a failure."""
    emit("failed.kept", task="ship")
    for outcome in (Outcome.FAILED, Outcome.SKIPPED, Outcome.REVOKED):
        emit("failed.replay_ended", task="ship", outcome=outcome)

    assert numbers(metrics, i.KEPT) == {
        ("kept", "ship"): 1,
        ("replay_failed", "ship"): 1,
        ("replay_succeeded", "ship"): 1,
    }


def test_the_first_failure_is_an_increase(metrics: Metrics) -> None:
    """Each task's numbers are there from the start, as zero."""
    metrics.start_at_zero({"ship": ["q"], "charge": ["q", "r"]})

    found = reading(metrics, i.OUTCOMES).numbers
    assert found[("charge", "r", "failed")] == 0
    assert reading(metrics, i.KEPT).numbers == {
        ("kept", "ship"): 0,
        ("kept", "charge"): 0,
    }
    end(Outcome.FAILED)
    assert reading(metrics, i.OUTCOMES).numbers[("ship", "q", "failed")] == 1


def test_setting_up_twice_counts_once(metrics: Metrics) -> None:
    """A second worker in one process takes the first one's place."""
    second = Metrics(["ship"])
    second.attach()
    second.attach()

    end(Outcome.SUCCEEDED)

    assert numbers(metrics, i.OUTCOMES) == {}
    assert numbers(second, i.OUTCOMES) == {("ship", "q", "succeeded"): 1}
    second.detach()


def test_many_threads_lose_none(metrics: Metrics) -> None:
    """The pool of threads settles in each of them, while others read."""
    each = module.MAX_NOTES  # so that some of them count too

    def settle() -> None:
        for _ in range(each):
            end(Outcome.SUCCEEDED, run_s=0.1)

    threads = [Thread(target=settle) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.read()
    for thread in threads:
        thread.join()

    assert numbers(metrics, i.OUTCOMES) == {("ship", "q", "succeeded"): 4 * each}


def test_notes_do_not_pile_up_where_nobody_reads(metrics: Metrics) -> None:
    """Whoever makes one too many counts them."""
    for _ in range(module.MAX_NOTES + 10):
        end(Outcome.SUCCEEDED)

    assert len(metrics._notes) < 10


def test_what_happens_in_a_child_is_counted_once(metrics: Metrics) -> None:
    """In whichever of its threads, at an item of a batch, and though it is killed."""

    def child() -> None:
        thread = Thread(target=lambda: emit("circuits.opened", circuit="bank"))
        thread.start()
        thread.join()
        emit("failed.kept", task="ship")
        emit("failed.kept", task="made up")
        os.kill(os.getpid(), signal.SIGKILL)

    emit("circuits.opened", circuit="bank")
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        metrics.tick()

    assert numbers(metrics, i.EVENTS) == {("circuits.opened",): 3}
    assert numbers(metrics, i.KEPT) == {("kept", "ship"): 2, ("kept", OTHER): 2}


def test_what_was_dropped_is_counted(metrics: Metrics) -> None:
    """Of whichever signal."""
    emit("telemetry.dropped", signal="spans", count=3, why="the collector is away")

    assert numbers(metrics, i.DROPPED) == {("spans",): 3}


def test_a_look_that_fails_hides_nothing_else(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, and what nobody knows has no number."""
    metrics.look_at(i.BUSY, lambda: [((), 1 / 0)])
    metrics.look_at(i.SLOTS, lambda: [((), 4.0)])

    names = [it.instrument.name for _ in range(2) for it in metrics.read()]
    assert i.BUSY.name not in names
    assert numbers(metrics, i.SLOTS) == {(): 4.0}
    assert caplog.text.count("cannot look at") == 1


def test_who_hears_is_told_each_value_outside_of_the_lock(metrics: Metrics) -> None:
    """It asks for all numbers with a lock of its own in its hand."""
    told: list[tuple[str, Labels, float]] = []

    def hear(instrument: Instrument, labels: Labels, value: float) -> None:
        assert metrics._lock.acquire(timeout=1)
        metrics._lock.release()
        told.append((instrument.name, labels, value))

    metrics.hears = hear
    end(Outcome.SUCCEEDED, run_s=0.1, wait_s=0.2, attempt=2)
    metrics.tick()

    assert told == [
        (i.RUN.name, ("ship", "succeeded"), 0.1),
        (i.WAIT.name, ("ship", "q"), 0.2),
        (i.ATTEMPTS.name, ("ship",), 2),
    ]


# --- what runs count themselves --------------------------------------------------------


def a_run() -> RunCounts:
    """Of a task without hidden names."""
    return RunCounts(lambda name: False)


def business(metrics: Metrics) -> dict[str, Reading]:
    """What tasks have counted, by its name."""
    own = {it.name for it in i.ALL}
    return {
        it.instrument.name: it for it in metrics.read() if it.instrument.name not in own
    }


def test_runs_add_up(metrics: Metrics) -> None:
    """Counts and observations of several runs are one."""
    for _ in range(3):
        run = a_run()
        run.count("orders", 2, {"shop": "a"})
        run.observe("amount_eur", 12.5, {})
        emit(COUNTED, fact=run.fact())

    found = business(metrics)
    assert found["orders"].numbers == {("a",): 6}
    (amounts,) = found["amount_eur"].histograms.values()
    assert (amounts.count, amounts.sum) == (3, 37.5)
    assert amounts.counts[i.BUSINESS_BOUNDS.index(25)] == 3


@pytest.mark.parametrize(
    "again",
    [
        lambda run: run.observe("orders", 1, {"shop": "a"}),
        lambda run: run.count("orders", 1, {"branch": "a"}),
    ],
    ids=["other kind", "other labels"],
)
def test_a_name_has_one_kind_and_the_same_labels(
    metrics: Metrics, again: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not fit is dropped, counted and told once."""
    first, second = a_run(), a_run()
    first.count("orders", 1, {"shop": "a"})
    again(second)
    for run in (first, second, second):
        emit(COUNTED, fact=run.fact())

    assert business(metrics)["orders"].numbers == {("a",): 1}
    assert numbers(metrics, i.DROPPED) == {("metrics",): 2}
    assert caplog.text.count("metric orders is not counted") == 1


def test_names_and_values_are_bounded(metrics: Metrics) -> None:
    """A task that makes them up fills neither memory nor the page."""
    for number in range(module.MAX_BUSINESS + 3):
        run = a_run()
        run.count(f"n{number}", 1, {})
        run.count("orders", 1, {"customer": number})
        emit(COUNTED, fact=run.fact())

    found = business(metrics)
    assert len(found) == module.MAX_BUSINESS
    assert len(found["orders"].numbers) == module.MAX_BUSINESS_VALUES + 1
    assert sum(found["orders"].numbers.values()) == module.MAX_BUSINESS + 3
    assert numbers(metrics, i.DROPPED) == {("metrics",): 4}


def test_the_product_of_labels_is_bounded(metrics: Metrics) -> None:
    """Few values of several labels are many series; the sums stay right."""
    for number in range(module.MAX_BUSINESS_SERIES + 50):
        run = a_run()
        labels = {"shop": number % 60, "kind": number // 60}
        run.count("orders", 1, labels)
        run.observe("amount_eur", 1, labels)
        emit(COUNTED, fact=run.fact())

    found = business(metrics)
    orders, amounts = found["orders"].numbers, found["amount_eur"].histograms
    assert len(orders) == len(amounts) == module.MAX_BUSINESS_SERIES + 1
    assert orders[(OTHER, OTHER)] == amounts[(OTHER, OTHER)].count == 50
    assert orders[("0", "0")] == 1


# --- series ------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcdef"), max_size=40), st.integers(1, 4))
def test_what_is_one_too_many_is_counted_as_other(
    values: list[str], limit: int
) -> None:
    """The sum is right whatever comes, and no label has more values than it may."""
    series = Series(i.DROPPED, max_values=limit)
    for value in values:
        series.add((value,))

    assert sum(series.numbers.values()) == len(values)
    assert len(series.numbers) <= limit + 1
    assert {v for v in dict.fromkeys(values)} - {l for (l,) in series.numbers} == set(
        list(dict.fromkeys(values))[limit:]
    )
