"""Numbers that people write: settings, options, flags and words of a command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience import command, flags
from celery_resilience.click_types import SECONDS, FiniteRange
from celery_resilience.errors import ConfigurationError
from celery_resilience.finite import is_finite
from celery_resilience.memory_amount import is_memory_amount
from celery_resilience.settings import read_settings

#: What no time, size or count is.
ENDLESS = [float("nan"), float("inf"), float("-inf"), 10**400]


@given(st.integers(-(10**300), 10**300) | st.floats(allow_nan=False))
def test_what_a_float_can_hold_is_a_number(value: float) -> None:
    """Whole or not, of either sign; infinity is none."""
    assert is_finite(value) is (abs(value) != float("inf"))


@pytest.mark.parametrize("value", [*ENDLESS, True, "5", None])
def test_the_rest_is_none(value: Any) -> None:
    """A boolean is no number either, nor is a text."""
    assert not is_finite(value)


@pytest.mark.parametrize("value", ENDLESS)
@pytest.mark.parametrize(
    "name",
    [
        "failed_keep_days",
        "failed_max_mib",
        "crash_window_s",
        "drain_timeout_s",
        "memory_recycle_mib",
        "memory_limit_mib",
    ],
)
def test_an_endless_setting_is_refused(name: str, value: float) -> None:
    """With its name and value: nothing would ever be too late or too large."""
    with pytest.raises(ConfigurationError) as raised:
        read_settings({f"resilience_{name}": value})

    assert str(raised.value).startswith(f"resilience_{name} must be a number of ")
    assert str(raised.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("value", ENDLESS)
def test_an_endless_amount_of_memory_is_none(value: float) -> None:
    """Of a task's option and a flag, too."""
    assert not is_memory_amount(value)


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "infinity", "1e999"])
def test_an_endless_word_is_refused(word: str) -> None:
    """click's own range has nan in it, for nothing is less or more."""
    with pytest.raises(click.BadParameter, match=r"must be|not in the range"):
        SECONDS.convert(word, None, None)


def test_a_number_of_seconds_is_taken() -> None:
    """Above 0, and not 0."""
    assert SECONDS.convert("0.5", None, None) == 0.5
    with pytest.raises(click.BadParameter, match="not in the range"):
        SECONDS.convert("0", None, None)


def _parameters(group: click.Command) -> Iterator[click.Parameter]:
    yield from group.params
    if isinstance(group, click.Group):
        for verb in group.commands.values():
            yield from _parameters(verb)


def test_every_flag_and_option_that_takes_a_number_takes_a_finite_one() -> None:
    """A new one of click's own type would be seen here."""
    every: list[click.Parameter] = [
        *flags._options(),
        *_parameters(command.failed),
        *_parameters(command.resilience),
    ]

    ranges = [p for p in every if isinstance(p.type, click.types.FloatParamType)]
    assert len(ranges) >= 5
    assert not [p.name for p in ranges if not isinstance(p.type, FiniteRange)]
