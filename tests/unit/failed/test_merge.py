"""What a document changes in its record, whenever it comes and however often."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import (
    a_failed_document,
    a_message,
    a_settlement,
    a_success_document,
    replay_mark,
)

from celery_resilience.failed.capture import Capture
from celery_resilience.failed.envelope import loads
from celery_resilience.failed.merge import (
    FIRST_ATTEMPTS,
    LAST_ATTEMPTS,
    Record,
    merged,
)
from celery_resilience.failed.record import Phase, State
from celery_resilience.message import HEADER, OriginalMessage
from celery_resilience.outcome import Outcome, Settlement

Document = Mapping[str, Any]

FIRST = a_failed_document(at=1_000.0)
ID = FIRST["id"]


def failed(**facts: Any) -> dict[str, Any]:
    """A failure of the one record."""
    return a_failed_document(record=ID, **facts)


def succeeded(**facts: Any) -> dict[str, Any]:
    """A success of the one record."""
    return a_success_document(record=ID, **facts)


def revoked(**facts: Any) -> dict[str, Any]:
    """A replay of the one record that was dropped before it ran."""
    return a_success_document(record=ID, outcome=Outcome.REVOKED, **facts)


def after(documents: Iterable[Document], record: Record | None = None) -> Record | None:
    """The record after *documents*, in this order."""
    for document in documents:
        record = merged(record, document)
    return record


def claimed(record: Record | None, token: str, phase: Phase = Phase.RUNNING) -> Record:
    """What a store's claim makes of a record, and a worker's start."""
    assert record is not None
    return replace(
        record,
        state=State.REPLAYING,
        number=record.number + 1,
        token=token,
        phase=phase,
        note=None,
    )


def captures(record: Record | None) -> list[str]:
    """The captures whose attempts a record has."""
    assert record is not None
    return [attempt["_capture"] for attempt in record.attempts]


def kept() -> Record:
    """A record of one failure."""
    record = merged(None, FIRST)
    assert record is not None
    return record


# --- failures -------------------------------------------------------------------------


def test_the_first_failure_makes_the_record() -> None:
    """Unresolved, with its document and one attempt."""
    record = kept()

    assert record.id == FIRST["id"]
    assert record.state is State.UNRESOLVED
    assert record.document == FIRST
    assert captures(record) == [FIRST["capture"]]
    assert record.attempts[0]["exception"] == "shop.errors.NoStock"
    assert (record.number, record.token, record.phase) == (0, None, None)


def test_the_same_document_again_changes_nothing() -> None:
    """A collector that died between commit and ack sees it twice."""
    assert merged(kept(), FIRST) == kept()


def test_a_redelivered_capture_of_the_same_attempt_changes_nothing() -> None:
    """Captured, killed before the ack, delivered again, failed again."""
    again = failed(at=1_050.0, redelivered=True)

    assert merged(kept(), again) == kept()


TAGS = ("7b1d7a5e-2f1c-4a51-8d0c-3f3b0d1f0a01", "7b1d7a5e-2f1c-4a51-8d0c-3f3b0d1f0a02")

#: Two messages of one task id: on Redis by their tags, on AMQP by what differs.
TWO_MESSAGES = [
    [a_message(properties={"delivery_tag": tag}) for tag in TAGS],
    [a_message(body=body, properties={"delivery_tag": 1}) for body in (b"1", b"2")],
]


@pytest.mark.parametrize("messages", TWO_MESSAGES, ids=["redis", "amqp"])
@pytest.mark.parametrize("state", [State.DISCARDED, State.RESOLVED, State.UNRESOLVED])
def test_a_task_id_that_is_used_again_hides_no_failure(
    messages: list[OriginalMessage], state: State
) -> None:
    """Another message of it that fails is news, though it was delivered again."""
    first, second = messages
    record = after([failed(message=first)])
    assert record is not None
    if state is State.RESOLVED:
        record = after(
            [succeeded(at=1_020.0, number=1, token="t1")], claimed(record, "t1")
        )
        assert record is not None
    record = replace(record, state=state)
    again = failed(at=1_040.0, message=replace(first, redelivered=True))
    other = failed(at=1_050.0, message=replace(second, redelivered=True))

    assert merged(record, again) == record
    changed = merged(record, other)

    assert changed is not None
    assert changed.state is State.UNRESOLVED
    assert captures(changed) == [
        record.attempts[0]["_capture"],
        other["capture"],
    ]
    assert merged(changed, again) == changed


def test_a_further_attempt_is_added() -> None:
    """A redelivery of a later try is another attempt."""
    later = failed(at=1_050.0, redelivered=True, attempt=2)

    record = merged(kept(), later)

    assert captures(record) == [FIRST["capture"], later["capture"]]


def test_a_replay_that_fails_reopens_its_record() -> None:
    """On the same record with one attempt more, and the last failure's document."""
    record = claimed(kept(), "t1")
    failure = failed(at=2_000.0, number=1, token="t1", reason="retries_exhausted")

    record = merged(record, failure)

    assert record is not None
    assert record.state is State.UNRESOLVED
    assert (record.token, record.phase) == (None, None)
    assert record.number == 1
    assert record.document == failure
    assert captures(record) == [FIRST["capture"], failure["capture"]]


def test_the_failure_of_an_older_replay_is_only_an_attempt() -> None:
    """The newer replay goes on."""
    old = failed(at=2_000.0, number=1, token="t1")
    record = claimed(claimed(kept(), "t1"), "t2")

    changed = merged(record, old)

    assert changed == replace(record, attempts=changed.attempts)
    assert captures(changed) == [FIRST["capture"], old["capture"]]


def test_a_failure_with_another_token_is_only_an_attempt() -> None:
    """A replay that was called off has no say, even under the same number."""
    record = claimed(kept(), "t1")

    changed = merged(record, failed(at=2_000.0, number=1, token="other"))

    assert changed is not None
    assert (changed.state, changed.token) == (State.REPLAYING, "t1")


def test_a_late_capture_of_the_original_does_not_stop_a_replay() -> None:
    """A redelivered original that fails while the replay runs is only an attempt."""
    record = claimed(kept(), "t1")

    changed = merged(record, failed(at=1_100.0, redelivered=True, attempt=2))

    assert changed is not None
    assert (changed.state, changed.token) == (State.REPLAYING, "t1")
    assert len(changed.attempts) == 2


def test_a_late_capture_does_not_reopen_a_resolved_record() -> None:
    """The replay has had its effect."""
    record = after([succeeded(number=1, token="t1")], claimed(kept(), "t1"))

    changed = merged(record, failed(at=1_100.0, redelivered=True, attempt=2))

    assert changed is not None
    assert changed.state is State.RESOLVED
    assert changed.document == FIRST


def test_a_redelivered_run_does_not_reopen_what_it_has_resolved() -> None:
    """It had succeeded and was delivered again; its failure is later, and no news."""
    record = after([succeeded(at=2_000.0, number=1, token="t1")], claimed(kept(), "t1"))
    again = failed(at=2_500.0, number=1, token="t1", redelivered=True)

    changed = merged(record, again)

    assert changed is not None
    assert changed.state is State.RESOLVED
    assert changed.document == FIRST
    assert captures(changed) == [FIRST["capture"], again["capture"]]


def test_an_older_failure_that_comes_late_is_only_an_attempt() -> None:
    """A record shows its last failure, not the one that arrived last."""
    new, old = failed(at=2_000.0, attempt=2), failed(at=1_000.0)

    record = after([new, old])

    assert record is not None
    assert record.document == new


def test_a_new_failure_reopens_a_discarded_record() -> None:
    """The task was sent again by its user, and failed again."""
    record = replace(kept(), state=State.DISCARDED)

    changed = merged(record, failed(at=3_000.0))

    assert changed is not None
    assert changed.state is State.UNRESOLVED


def test_the_first_failure_to_arrive_may_be_a_replays() -> None:
    """A pruned record comes back with the number that its message has."""
    record = merged(None, failed(number=3, token="t3"))

    assert record is not None
    assert record.state is State.UNRESOLVED
    assert (record.number, record.token) == (3, None)


def test_a_record_keeps_its_first_and_last_attempts() -> None:
    """A task that fails for ever does not grow for ever."""
    documents = [failed(at=float(i)) for i in range(100)]

    kept_ones = captures(after(documents))

    expected = [*documents[:FIRST_ATTEMPTS], *documents[-LAST_ATTEMPTS:]]
    assert kept_ones == [document["capture"] for document in expected]


# --- successes ------------------------------------------------------------------------


def test_a_replays_success_resolves_the_record() -> None:
    """With the current token, and only then."""
    record = claimed(kept(), "t1")

    resolved = merged(record, succeeded(at=2_000.0, number=1, token="t1"))

    assert resolved is not None
    assert resolved.state is State.RESOLVED
    assert (resolved.phase, resolved.settled_at) == (None, 2_000.0)


@pytest.mark.parametrize(
    ("number", "token"), [(1, "other"), (1, None), (2, "other"), (7, "t")]
)
def test_another_replays_success_changes_nothing(number: int, token: Any) -> None:
    """A token that is not the current one has no say."""
    record = claimed(kept(), "t1")

    assert merged(record, succeeded(number=number, token=token)) == record


def test_a_replay_that_was_called_off_as_it_ran_resolves_its_record() -> None:
    """Its effect is there; another replay would double it."""
    record = replace(
        claimed(kept(), "t1"), state=State.UNRESOLVED, token=None, phase=None
    )

    changed = merged(record, succeeded(at=2_000.0, number=1, token="t1"))

    assert changed is not None
    assert changed.state is State.RESOLVED


def test_a_discarded_record_stays_discarded() -> None:
    """Whatever a replay that still ran comes to."""
    record = replace(
        claimed(kept(), "t1"), state=State.DISCARDED, token=None, phase=None
    )

    for late in (
        succeeded(at=2_000.0, number=1, token="t1"),
        failed(at=2_000.0, number=1, token="t1"),
    ):
        changed = merged(record, late)

        assert changed is not None
        assert changed.state is State.DISCARDED


def test_a_replays_success_without_a_record_makes_none() -> None:
    """It was pruned meanwhile."""
    assert merged(None, succeeded(number=1, token="t1")) is None


def test_a_redeliverys_success_makes_the_failure_void() -> None:
    """Captured, killed before the ack, delivered again, succeeded."""
    record = merged(kept(), succeeded(at=2_000.0))

    assert record is not None
    assert record.state is State.RESOLVED
    assert record.note == "succeeded when it was delivered again"


def test_a_success_may_come_before_the_failure_that_it_makes_void() -> None:
    """The failure was spooled, the success was not."""
    ghost = merged(None, succeeded(at=2_000.0))
    assert ghost is not None
    assert ghost.document is None

    record = merged(ghost, FIRST)

    assert record is not None
    assert record.state is State.RESOLVED
    assert record.document == FIRST
    assert captures(record) == [FIRST["capture"]]


def test_a_failure_after_the_success_is_a_new_one() -> None:
    """The same task was sent again by its user, and failed."""
    record = after([succeeded(at=2_000.0), failed(at=3_000.0)])

    assert record is not None
    assert record.state is State.UNRESOLVED


def test_the_originals_success_does_not_end_a_replay() -> None:
    """Only the replay itself says how it ended."""
    running = claimed(kept(), "t1")
    replayed_in_vain = after([failed(number=1, token="t1")], running)

    for record in (running, replayed_in_vain):
        assert merged(record, succeeded(at=5_000.0)) == record


# --- revokes --------------------------------------------------------------------------


def test_a_replay_that_was_revoked_is_unresolved_again() -> None:
    """Celery dropped its message; the note says so."""
    record = claimed(kept(), "t1")

    again = merged(record, revoked(number=1, token="t1", reason="expired"))

    assert again is not None
    assert again.state is State.UNRESOLVED
    assert (again.token, again.phase) == (None, None)
    assert again.note == "its replay was expired before it ran"


def test_another_revoke_changes_nothing() -> None:
    """Neither that of an older replay, nor one of an unknown record."""
    record = claimed(kept(), "t1")

    assert merged(record, revoked(number=1, token="old")) == record
    assert merged(kept(), revoked()) == kept()
    assert merged(None, revoked()) is None


# --- any order, any number of times ---------------------------------------------------


@st.composite
def stories(draw: st.DrawFn) -> tuple[Record | None, list[Document]]:
    """A record somewhere in its life, and documents that may still come for it."""
    documents: list[Document] = []
    for at in range(draw(st.integers(1, 3))):
        documents.append(
            failed(at=1_000.0 + at, attempt=at + 1, redelivered=draw(st.booleans()))
        )
    replays = draw(st.integers(0, 3))
    for number in range(1, replays + 1):
        token, at_s = f"t{number}", 2_000.0 + number
        for redelivered in draw(st.lists(st.booleans(), max_size=2)):
            documents.append(
                failed(at=at_s, number=number, token=token, redelivered=redelivered)
            )
        if draw(st.booleans()):
            documents.append(succeeded(at=at_s, number=number, token=token))
        if draw(st.booleans()):
            documents.append(revoked(at=at_s, number=number, token=token))
    if draw(st.booleans()):
        documents.append(succeeded(at=1_500.0))
    record: Record | None = None
    if replays or draw(st.booleans()):
        record = kept()
        for number in range(1, replays + 1):
            record = claimed(record, f"t{number}")
    return record, documents


shuffled = st.randoms(use_true_random=False)


@given(stories(), shuffled)
def test_no_capture_is_two_attempts(
    story: tuple[Record | None, list[Document]], random: Any
) -> None:
    """In any order, with every document coming up to three times."""
    record, documents = story
    often = documents * 3
    random.shuffle(often)

    record = after(often, record)

    if record is not None:
        assert len(captures(record)) == len(set(captures(record)))


@given(stories(), shuffled)
def test_a_document_that_was_merged_changes_nothing(
    story: tuple[Record | None, list[Document]], random: Any
) -> None:
    """As soon as it comes again, whatever came before."""
    record, documents = story
    random.shuffle(documents)

    for document in documents:
        record = merged(record, document)
        assert merged(record, document) == record


@given(stories(), shuffled)
def test_a_failure_that_was_merged_never_changes_anything_again(
    story: tuple[Record | None, list[Document]], random: Any
) -> None:
    """However late its copy comes, and whatever came between."""
    record, documents = story
    random.shuffle(documents)
    record = after(documents, record)

    for document in documents:
        if document["kind"] == "failed":
            assert merged(record, document) == record


@given(stories(), shuffled)
def test_an_older_replay_never_reopens_a_newer_one(
    story: tuple[Record | None, list[Document]], random: Any
) -> None:
    """Nor resolves it: only the current token decides."""
    record, documents = story
    random.shuffle(documents)
    for document in documents:
        before, record = record, merged(record, document)
        if before is None or before.number == 0:
            continue
        is_older = 0 < document["replay_number"] < before.number
        is_redelivered = document["replay_number"] == 0 and document.get("redelivered")
        if is_older or is_redelivered:
            assert record is not None
            assert (record.state, record.token) == (before.state, before.token)
            assert record.document == before.document


@given(stories(), shuffled)
def test_a_replays_success_with_the_current_token_resolves(
    story: tuple[Record | None, list[Document]], random: Any
) -> None:
    """Whatever else came before it and after the claim."""
    record, documents = story
    random.shuffle(documents)
    record = claimed(after(documents, record) or kept(), "now")
    number = record.number
    older = [d for d in documents if 0 < d["replay_number"] < number]

    record = after([*older, succeeded(number=number, token="now")], record)

    assert record is not None
    assert record.state is State.RESOLVED
    assert after(older, record).state is State.RESOLVED


@given(stories(), shuffled)
def test_a_record_is_replaying_exactly_as_long_as_it_has_a_phase(
    story: tuple[Record | None, list[Document]], random: Any
) -> None:
    """No document leaves a token that runs nowhere, or a phase of nothing."""
    record, documents = story
    random.shuffle(documents)
    for document in documents:
        record = merged(record, document)
        if record is not None:
            assert (record.state is State.REPLAYING) == (record.phase is not None)
            if record.state is State.UNRESOLVED:
                assert record.token is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_story_ends_the_same_in_any_order(order: tuple[int, ...]) -> None:
    """Failed, failed again at a later attempt, then succeeded: resolved."""
    story = [
        FIRST,
        failed(at=1_100.0, redelivered=True, attempt=2),
        succeeded(at=1_200.0),
    ]

    record = after(story[i] for i in order if i != 0 or order.index(0) < order.index(1))

    assert record is not None
    assert record.state is State.RESOLVED


def test_two_captures_of_one_attempt_are_one_in_either_order() -> None:
    """The first capture was spooled, the redelivery's was not (races.md, 17)."""
    again = failed(at=1_050.0, redelivered=True)

    record = after([again, FIRST])

    assert record is not None
    assert len(record.attempts) == 1


@pytest.mark.parametrize("ending", ["replaying", "resolved", "succeeded"])
def test_a_first_capture_that_comes_late_reopens_nothing(ending: str) -> None:
    """It lay in the spool while its redelivery's capture was replayed (races.md, 2)."""
    record = after([failed(at=1_050.0, redelivered=True)])
    if ending == "succeeded":
        record = after([succeeded(at=1_100.0)], record)
    else:
        record = claimed(record, "t1")
    if ending == "resolved":
        record = after([succeeded(at=2_000.0, number=1, token="t1")], record)
    assert record is not None

    changed = merged(record, FIRST)

    assert changed is not None
    assert (changed.state, changed.token) == (record.state, record.token)


def test_a_redelivered_replays_success_makes_its_failure_void() -> None:
    """The replay failed, was captured, killed before the ack, ran again, succeeded."""
    record = claimed(kept(), "t1")

    record = after(
        [
            failed(at=2_000.0, number=1, token="t1"),
            succeeded(at=2_100.0, number=1, token="t1"),
        ],
        record,
    )

    assert record is not None
    assert record.state is State.RESOLVED


def test_a_replays_failure_that_its_redelivery_made_void_may_come_late() -> None:
    """As the above, with the failure in the spool."""
    record = claimed(kept(), "t1")

    record = after(
        [
            succeeded(at=2_100.0, number=1, token="t1"),
            failed(at=2_000.0, number=1, token="t1"),
        ],
        record,
    )

    assert record is not None
    assert record.state is State.RESOLVED


def test_a_success_does_not_resolve_a_failure_that_is_younger() -> None:
    """The success was collected twice, with a new failure in between."""
    success, failure = succeeded(at=2_000.0), failed(at=3_000.0)

    assert after([success, failure, success]) == after([success, failure])


def test_a_dropped_copy_does_not_resolve_a_running_replay() -> None:
    """
    The fence drops the second copy while the first one runs.

    The first copy may still fail; and if its worker dies, its redelivery finds
    the record resolved and is dropped too: the task is lost.
    """
    record = claimed(kept(), "t1")
    capture = Capture(
        namespace="shop",
        default_queue="shop.failed",
        routes=(),
        own_queue=lambda name: None,
        clock=lambda: 2_000.0,
        release=None,
    )
    settlement: Settlement = a_settlement(
        outcome=Outcome.SKIPPED,
        reason="replay_duplicate",
        marks=replay_mark(ID, "t1", 1),
    )
    report = capture.message_for(
        settlement, a_message(headers={HEADER: settlement.marks})
    )

    changed = record if report is None else merged(record, loads(report.body))

    assert changed == record


def test_attempts_are_oldest_first() -> None:
    """As Record and FailedTask.attempts say; a spool delivers late."""
    old, new = failed(at=1_000.0), failed(at=2_000.0, attempt=2)

    record = after([new, old])

    assert captures(record) == [old["capture"], new["capture"]]


def test_the_copy_of_a_forgotten_attempt_changes_nothing() -> None:
    """Of more than fifty, the middle ones are dropped."""
    documents = [failed(at=float(i)) for i in range(100)]
    record = after(documents)

    assert merged(record, documents[50]) == record


# --- deaths on the broker -------------------------------------------------------------


def dead(**facts: Any) -> dict[str, Any]:
    """The broker's word of a death of the one record's message."""
    return {**failed(failed_queue="dead", **facts), "dead_letter": "rejected"}


def test_a_death_after_its_capture_is_known() -> None:
    """A rejected task is kept by its worker, and then moved by the broker."""
    record = after([FIRST])

    assert after([dead(at=1_000.0)], record) == record
    assert after([dead(at=999.0)], record) == record, "the broker tells whole seconds"
    assert after([dead(at=5_000.0)], record) == record, "delivered again meanwhile"


def test_a_capture_after_its_death_tells_more() -> None:
    """Collected in this order, there is one failure still, with its traceback."""
    capture = failed(at=1_000.9)

    record = after([dead(at=1_000.0), capture])

    assert record == after([capture])


def test_what_an_operator_decided_stands_when_a_capture_tells_more() -> None:
    """Only what is shown of the failure changes."""
    record = replace(kept_dead(), state=State.DISCARDED)

    told = after([failed(at=1_000.0)], record)

    assert told is not None
    assert told.state is State.DISCARDED
    assert told.document is not None
    assert "dead_letter" not in told.document


def test_a_later_failure_stays_shown_when_a_capture_tells_more() -> None:
    """Of an earlier death."""
    later = failed(at=2_000.0, attempt=2)

    record = after([dead(at=1_000.0), later, failed(at=1_000.0)])

    assert record is not None
    assert record.document == later
    assert len(record.attempts) == 2


def test_a_capture_long_after_a_death_is_another_failure() -> None:
    """Somebody has sent a task with that id again."""
    record = after([dead(at=1_000.0), failed(at=1_007.0)])

    assert len(captures(record)) == 2


def test_a_death_before_a_capture_is_another_failure() -> None:
    """It cannot be what followed on it."""
    record = after([failed(at=1_007.0), dead(at=1_000.0)])

    assert len(captures(record)) == 2


@pytest.mark.parametrize("other", [{"attempt": 2}, {"number": 1, "token": "t"}])
def test_a_death_of_another_attempt_is_another_failure(other: dict[str, Any]) -> None:
    """A retry that is rejected, or a replay."""
    record = claimed(after([FIRST]), "t") if "number" in other else after([FIRST])

    told = after([dead(at=1_001.0, **other)], record)

    assert len(captures(told)) == 2
    assert told is not None
    assert told.state is State.UNRESOLVED


def test_two_deaths_are_two_failures() -> None:
    """Their captures tell them apart, not their attempts."""
    assert len(captures(after([dead(at=1_000.0), dead(at=1_001.0)]))) == 2


def kept_dead() -> Record:
    """A record that only a death has told of."""
    record = after([dead(at=1_000.0)])
    assert record is not None
    return record
