"""Flushing takes as long as it may, and no longer."""

from __future__ import annotations

import logging
from threading import Event

import pytest

from celery_resilience.telemetry.flushing import flush_within


def test_it_is_waited_for() -> None:
    """Until it has ended."""
    done = Event()

    assert flush_within(30, done.set)
    assert done.is_set()


def test_it_is_not_waited_for_longer() -> None:
    """The process ends without it."""
    end = Event()

    assert not flush_within(0.05, lambda: end.wait(30))
    end.set()


def test_what_it_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """And counts as its end."""

    def fail() -> None:
        raise OSError("away")

    with caplog.at_level(logging.ERROR):
        assert flush_within(30, fail)

    assert "could not be flushed" in caplog.text
