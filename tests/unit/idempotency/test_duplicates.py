"""What a duplicate hears, by its task's options and by what the store says."""

from __future__ import annotations

from typing import Any

import pytest

from celery_resilience.errors import (
    AlreadyDone,
    AlreadyRunning,
    AskAgain,
    DropDelivery,
    Skip,
    Snooze,
)
from celery_resilience.idempotency import duplicates
from celery_resilience.idempotency.duplicates import Call
from celery_resilience.idempotency.options import KeyOptions
from celery_resilience.idempotency.record import Begun, KeyState, Verdict
from celery_resilience.idempotency.results import HANDED_OVER, pack

SAVED = pack("saved", "json", has_backend=True)


class Backend:
    """Knows one task."""

    def __init__(self, status: str | None = None, result: Any = None) -> None:
        self._found = (status, result)

    def result_of(self, task_id: str) -> tuple[str | None, Any]:
        assert task_id == "first"
        return self._found


def a_call(*, backend: Backend | None = None, **facts: Any) -> Call:
    """A delivery of the task "second"."""
    options = {
        name: facts.pop(name) for name in ("if_running", "if_done") if name in facts
    }
    parts: dict[str, Any] = {
        "task": "shop.charge",
        "task_id": "second",
        "name": "charge:1",
        "fingerprint": "f" * 32,
        "options": KeyOptions(
            **{
                "keep_s": 60.0,
                "lease_s": 60.0,
                "if_running": "snooze",
                "if_done": "return_saved",
                "if_interrupted": "rerun",
                "is_unique_enqueue": False,
                **options,
            }
        ),
        "snoozes": 0,
        "dead_holder": None,
        "is_forced": False,
        "arguments": ((1,), {}),
        "is_in_canvas": False,
        "stores_result": True,
        "backend": backend or Backend(),
        "let_go": lambda: None,
    }
    return Call(**{**parts, **facts})


def done(call: Call, result: bytes | None = SAVED) -> Exception:
    """What a call hears whose effect has happened in the task "first"."""
    begun = Begun(Verdict.DONE, owner="first", result=result)
    return duplicates.done(call, begun, None)


def busy(
    call: Call,
    *,
    state: KeyState = KeyState.RUNNING,
    owner: str = "first",
    remaining_s: float = 600.0,
) -> Exception:
    """What a call hears while the task "first" has the key."""
    begun = Begun(Verdict.BUSY, found=state, owner=owner, remaining_s=remaining_s)
    return duplicates.busy(call, begun)


# --- while another runs ---------------------------------------------------------------


def test_a_duplicate_looks_again_longer_each_time() -> None:
    """Not beyond half a minute, nor five where a retry is waited for."""
    delays = {}
    for state in (KeyState.RUNNING, KeyState.RETRYING):
        for snoozes in (0, 3, 100):
            heard = busy(a_call(snoozes=snoozes), state=state)
            assert isinstance(heard, Snooze)
            delays[state, snoozes] = heard.countdown_s

    assert 0.75 <= delays[KeyState.RUNNING, 0] <= 1
    assert 6 <= delays[KeyState.RUNNING, 3] <= 8
    assert 22.5 <= delays[KeyState.RUNNING, 100] <= 30
    assert 225 <= delays[KeyState.RETRYING, 100] <= 300


def test_a_duplicate_looks_when_the_lease_ends_at_the_latest() -> None:
    """A run that died is waited for no longer than that."""
    heard = busy(a_call(snoozes=100), remaining_s=7.0)

    assert isinstance(heard, Snooze)
    assert heard.countdown_s == 7.0


def test_a_redelivery_of_the_run_itself_asks_again_whatever_the_task_says() -> None:
    """The run may still die, and then this message is what is left."""
    for option in ("snooze", "skip", "error"):
        heard = busy(a_call(if_running=option, task_id="first"))
        assert isinstance(heard, AskAgain)


def test_a_duplicate_may_be_skipped_or_an_error() -> None:
    """Skipped not where something waits for its result."""
    assert isinstance(busy(a_call(if_running="skip")), Skip)
    assert isinstance(busy(a_call(if_running="skip", is_in_canvas=True)), Snooze)
    refused = busy(a_call(if_running="error"))
    assert isinstance(refused, AlreadyRunning)
    assert "first" in str(refused)


# --- when it is done ------------------------------------------------------------------


def test_a_duplicate_has_the_saved_result() -> None:
    """Without a look at the result backend."""
    heard = done(a_call(backend=Backend("FAILURE")))

    assert isinstance(heard, Skip)
    assert heard.result == "saved"


def test_a_done_one_may_be_an_error_but_not_for_itself() -> None:
    """A redelivery of the first is the first."""
    assert isinstance(done(a_call(if_done="error")), AlreadyDone)
    assert isinstance(done(a_call(if_done="error", task_id="first")), Skip)


@pytest.mark.parametrize("status", ["SUCCESS", "STARTED", None])
def test_what_follows_is_sent_again_unless_the_result_is_stored(
    status: str | None,
) -> None:
    """Celery stores it after it has sent that."""
    let_go: list[None] = []

    done(
        a_call(
            task_id="first",
            backend=Backend(status, "stored"),
            let_go=lambda: let_go.append(None),
        )
    )

    assert len(let_go) == (1 if status == "SUCCESS" else 0)


@pytest.mark.parametrize(
    ("facts", "status", "kind"),
    [
        ({}, "SUCCESS", Skip),
        ({}, "STARTED", Snooze),
        ({"snoozes": duplicates.MAX_LOOKS}, "STARTED", Skip),
        ({}, None, Skip),
        ({"task_id": "first"}, "STARTED", DropDelivery),
        ({"task_id": "first"}, "SUCCESS", Skip),
    ],
)
def test_a_duplicate_of_a_replaced_one_waits_for_the_other(
    facts: dict[str, Any], status: str | None, kind: type[Exception]
) -> None:
    """As long as that is known, and not for ever."""
    heard = done(a_call(backend=Backend(status, "other"), **facts), HANDED_OVER)

    assert type(heard) is kind
    if isinstance(heard, Skip):
        assert heard.result == ("other" if status == "SUCCESS" else None)


@pytest.mark.parametrize(
    ("facts", "result", "status", "runs"),
    [
        ({}, SAVED, None, False),
        ({"if_done": "rerun"}, SAVED, None, True),
        ({"if_done": "rerun", "task_id": "first"}, SAVED, None, False),
        ({}, HANDED_OVER, "SUCCESS", False),
        ({}, HANDED_OVER, "FAILURE", True),
        ({}, HANDED_OVER, "REVOKED", True),
        ({}, HANDED_OVER, None, False),
    ],
)
def test_a_done_one_runs_again_where_that_is_said_or_its_heir_has_failed(
    facts: dict[str, Any], result: bytes, status: str | None, runs: bool
) -> None:
    """A redelivery of the first does not."""
    call = a_call(backend=Backend(status), **facts)
    begun = Begun(Verdict.DONE, owner="first", result=result)

    assert duplicates.runs_again(call, begun) is runs
