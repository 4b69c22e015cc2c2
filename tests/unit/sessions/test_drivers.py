"""What a driver says of its connection is read without a round trip."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace
from typing import Any

import pytest

from celery_resilience.sessions import drivers
from celery_resilience.sessions.policy import DriverState


def of(module: str, **facts: Any) -> Any:
    """A connection of a driver's."""
    return type("Connection", (SimpleNamespace,), {"__module__": module})(**facts)


@pytest.mark.parametrize("module", ["psycopg", "psycopg2.extensions"])
@pytest.mark.parametrize(
    ("status", "state"),
    [
        (0, DriverState.IDLE),
        (1, DriverState.BUSY),
        (2, DriverState.IN_TRANSACTION),
        (3, DriverState.FAILED),
        (4, DriverState.DEAD),
        (9, DriverState.UNSAID),
    ],
)
def test_libpqs_states(module: str, status: int, state: DriverState) -> None:
    """Of both of psycopg."""
    info = SimpleNamespace(transaction_status=status)

    assert drivers.state_of(of(module, closed=False, info=info)) is state
    assert drivers.state_of(of(module, closed=True, info=info)) is DriverState.DEAD


def test_sqlites_states() -> None:
    """Python's own driver."""
    connection = sqlite3.connect(":memory:")

    assert drivers.state_of(connection) is DriverState.IDLE
    connection.execute("CREATE TABLE t (id int)")
    connection.execute("INSERT INTO t VALUES (1)")
    assert drivers.state_of(connection) is DriverState.IN_TRANSACTION
    connection.close()


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"open": False}, DriverState.DEAD),
        ({"open": True, "server_status": 3}, DriverState.IN_TRANSACTION),
        ({"open": True, "server_status": 2}, DriverState.UNSAID),
    ],
)
def test_pymysqls_states(facts: dict[str, Any], state: DriverState) -> None:
    """By the flags of the server's last answer."""
    assert drivers.state_of(of("pymysql.connections", **facts)) is state


def test_another_driver_says_nothing() -> None:
    """And one that raises says nothing either."""
    assert drivers.state_of(object()) is DriverState.UNSAID
    assert drivers.state_of(of("psycopg")) is DriverState.UNSAID


def test_a_driver_that_raises_is_asked_over_the_wire() -> None:
    """Its socket may be gone."""
    assert drivers.is_readable(of("psycopg"))
    assert not drivers.is_readable(object())
