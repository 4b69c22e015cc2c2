"""What is done with what a body leaves behind is decided by the driver's state alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.sessions.policy import (
    IDLE_S,
    LISTEN,
    LOCK,
    NO_EFFECT,
    SET,
    TEMPORARY,
    Action,
    DriverState,
    Leak,
    action_for,
    effect_of,
    left_by,
    should_ask,
)


@given(st.sampled_from(DriverState))
def test_every_state_has_an_action_and_only_idle_has_none(state: DriverState) -> None:
    """A connection that is not surely clean is never left as it is."""
    action = action_for(state)

    assert (action is Action.NOTHING) is (state is DriverState.IDLE)


def test_a_statement_under_way_is_cancelled_on_its_server() -> None:
    """A rollback would not be taken there, and a close would leave it running."""
    assert action_for(DriverState.BUSY) is Action.CANCEL
    assert action_for(DriverState.DEAD) is Action.THROW_AWAY


@given(st.floats(min_value=0, max_value=1e9) | st.none(), st.booleans())
def test_who_is_readable_or_long_idle_is_asked(
    idle_s: float | None, is_readable: bool
) -> None:
    """And nobody else: there is no round trip for a busy worker."""
    asked = should_ask(idle_s=idle_s, is_readable=is_readable)

    assert asked is (is_readable or (idle_s or 0) > IDLE_S)


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("SET search_path TO shop", SET),
        ("  set session statement_timeout = 5", SET),
        ("/* a comment */ SET ROLE other", SET),
        ("-- a comment\nSET NAMES utf8mb4", SET),
        ("SELECT set_config('a.b', 'c', false)", SET),
        ("LISTEN news", LISTEN),
        ("CREATE TEMP TABLE t (id int)", TEMPORARY),
        ("create local temporary table t as select 1", TEMPORARY),
        ("SELECT pg_advisory_lock(1)", LOCK),
        ("SELECT pg_try_advisory_lock_shared(1, 2)", LOCK),
        ("SELECT GET_LOCK('a', 1)", LOCK),
    ],
)
def test_what_outlives_its_transaction_is_seen(statement: str, kind: str) -> None:
    """By the words that do it, in any case, behind any comment."""
    assert effect_of(statement) == ((kind,), ())
    assert left_by([effect_of(statement)]) == {kind}


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "UPDATE t SET a = 1",
        "INSERT INTO t VALUES ('set x')",
        "SET LOCAL statement_timeout = 5",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SELECT pg_advisory_xact_lock(1)",
        "SELECT set_config('a.b', 'c', true)",
        "CREATE TABLE temperature (id int)",
        "DELETE FROM listeners",
    ],
)
def test_what_ends_with_its_transaction_is_nothing(statement: str) -> None:
    """It costs no round trip, and is told of by nobody."""
    assert left_by([effect_of(statement)]) == set()


@pytest.mark.parametrize(
    ("statements", "left"),
    [
        (["SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock(1)"], set()),
        (
            [
                "SELECT pg_advisory_lock(1)",
                "SELECT pg_advisory_lock(2)",
                "SELECT pg_advisory_unlock(2)",
            ],
            {LOCK},
        ),
        (["CREATE TEMP TABLE t (id int)", "DROP TABLE t"], set()),
        (["SET a = 1", "SET b = 2", "RESET ALL"], set()),
        (["RESET ALL", "SET a = 1"], {SET}),
        (["DROP TABLE t", "CREATE TEMP TABLE t (id int)"], {TEMPORARY}),
    ],
)
def test_what_a_body_undoes_itself_is_not_left(
    statements: list[str], left: set[str]
) -> None:
    """In the order in which it was done."""
    assert left_by(map(effect_of, statements)) == left


@given(st.text())
def test_any_text_is_read(statement: str) -> None:
    """A statement may be anything, and reading it raises nothing."""
    leaves, ends = effect_of(statement)

    assert set(leaves) | set(ends) <= {SET, LISTEN, LOCK, TEMPORARY}


@given(st.text(alphabet="abcdfghijkmnoqrvwxyz0123456789 ,.()"))
def test_a_statement_without_the_words_has_no_effect(statement: str) -> None:
    """The quick look says no."""
    assert effect_of(statement) is NO_EFFECT


def test_a_leak_says_what_since_when_and_where() -> None:
    """In one part of a line."""
    assert str(Leak("open transaction", 1.5, "a.py:7")) == (
        "open transaction, open for 1.500 s, taken at a.py:7"
    )
    assert str(Leak("SET")) == "SET"
