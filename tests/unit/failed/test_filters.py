"""FILTERS: what each word accepts, refuses and matches."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import a_summary

from celery_resilience.errors import ConfigurationError
from celery_resilience.failed.filters import (
    Filter,
    is_match,
    parse_age_s,
    parse_argument,
    parse_reason,
    parse_state,
    parse_time,
)
from celery_resilience.failed.record import State
from celery_resilience.outcome import Reason
from celery_resilience.redaction import show_arguments

NOW = 1_764_000_000.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1_800),
        ("2h", 7_200),
        ("7d", 604_800),
        ("1w", 604_800),
        ("1.5h", 5_400),
        ("0s", 0),
        (" 2h ", 7_200),
    ],
)
def test_an_age_is_a_number_with_its_unit(text: str, seconds: float) -> None:
    """Seconds, minutes, hours, days, weeks."""
    assert parse_age_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "2", "h", "2 h", "-2h", "2H", "2h30m", "1e3s", "2y"]
)
def test_what_is_no_age_is_refused(text: str) -> None:
    """With what to write."""
    with pytest.raises(
        ConfigurationError, match="write 90s, 30m, 2h, 7d or 1w"
    ) as told:
        parse_age_s(text)

    assert repr(text) in str(told.value)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        (None, None),
        ("2h", NOW - 7_200),
        (" 7d ", NOW - 604_800),
        (timedelta(minutes=1), NOW - 60),
        (1_700_000_000, 1_700_000_000.0),
        (0.5, 0.5),
        ("2026-11-23T22:10", 1_795_471_800.0),
        ("2026-11-23T22:10:00Z", 1_795_471_800.0),
        ("2026-11-24T00:10+02:00", 1_795_471_800.0),
        ("2026-11-23", 1_795_392_000.0),
        (datetime(2026, 11, 23, 22, 10), 1_795_471_800.0),  # noqa: DTZ001 - no zone
        (datetime(2026, 11, 23, 22, 10, tzinfo=UTC), 1_795_471_800.0),
        (
            datetime(2026, 11, 24, 0, 10, tzinfo=timezone(timedelta(hours=2))),
            1_795_471_800.0,
        ),
    ],
)
def test_a_time_is_an_age_or_a_date(text: Any, at: float | None) -> None:
    """An age counts back from now; a time without a zone is in UTC."""
    assert parse_time(text, NOW) == at


@pytest.mark.parametrize("text", ["", "yesterday", "2", "2026-13-01", "-2h", "10:00"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """With what to write."""
    with pytest.raises(ConfigurationError, match="is not a time: write an age") as told:
        parse_time(text, NOW)

    assert repr(text) in str(told.value)


def test_a_state_is_one_of_four_or_all() -> None:
    """No word means the verb's own default."""
    for state in State:
        assert parse_state(str(state), None) is state
    assert parse_state("all", State.UNRESOLVED) is None
    assert parse_state(None, State.DISCARDED) is State.DISCARDED
    assert parse_state(None, None) is None


@pytest.mark.parametrize("text", ["", "open", "Unresolved", "ALL"])
def test_an_unknown_state_is_refused(text: str) -> None:
    """With all that are known."""
    with pytest.raises(ConfigurationError) as told:
        parse_state(text, None)

    assert str(told.value) == (
        f"--state {text!r} is not known: use unresolved, replaying, resolved, "
        "discarded, all"
    )


def test_a_reason_is_one_of_ours() -> None:
    """No word means any."""
    for reason in Reason:
        assert parse_reason(str(reason)) == reason
    assert parse_reason(None) is None


@pytest.mark.parametrize("text", ["", "oops", "Exception"])
def test_an_unknown_reason_is_refused(text: str) -> None:
    """With all that are known."""
    with pytest.raises(ConfigurationError, match="is not known: use one of") as told:
        parse_reason(text)

    assert all(str(reason) in str(told.value) for reason in Reason)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("order=7", ("order", "7")),
        ("a=b=c", ("a", "b=c")),
        ("a=", ("a", "")),
        ("0=x y", ("0", "x y")),
    ],
)
def test_an_argument_is_a_name_and_a_value(text: str, pair: tuple[str, str]) -> None:
    """The first = parts them."""
    assert parse_argument(text) == pair


@pytest.mark.parametrize("text", ["", "order", "=7", "="])
def test_what_is_no_argument_is_refused(text: str) -> None:
    """With its form."""
    with pytest.raises(ConfigurationError, match="must be NAME=VALUE") as told:
        parse_argument(text)

    assert repr(text) in str(told.value)


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (Filter(), True),
        (Filter(task="shop.*"), True),
        (Filter(task="shop.ship"), True),
        (Filter(task="shop"), False),
        (Filter(task="SHOP.*"), False),
        (Filter(task="shop.[a-r]*"), False),
        (Filter(task="shop.[!a-r]*"), True),
        (Filter(worker="celery@*"), True),
        (Filter(worker="celery@o?e"), True),
        (Filter(worker="celery"), False),
        (Filter(exception="shop.errors.NoStock"), True),
        (Filter(exception="NoStock"), True),
        (Filter(exception="No*"), True),
        (Filter(exception="*.NoStock"), True),
        (Filter(exception="errors.NoStock"), False),
        (Filter(exception="nostock"), False),
        (Filter(task="shop.*", exception="KeyError"), False),
        (Filter(task="other.*", exception="NoStock"), False),
        (Filter(task=""), False),
    ],
    ids=str,
)
def test_globs_match_the_whole_name(wanted: Filter, matches: bool) -> None:
    """An exception's short name matches too; every glob must match."""
    assert is_match(wanted, a_summary(), "{}") is matches


def matches_arguments(
    wanted: tuple[tuple[str, str], ...], shown: dict[str, str]
) -> bool:
    """Whether a failed task with these arguments is meant."""
    return is_match(Filter(args=wanted), a_summary(), json.dumps(shown))


@given(st.from_regex(r"[A-Za-z0-9_ .:/@-]*", fullmatch=True))
def test_an_argument_matches_as_it_was_passed(value: str) -> None:
    """Quoted as it is shown, or not."""
    shown = show_arguments([], {"name": value}).named

    assert matches_arguments((("name", value),), dict(shown))
    assert matches_arguments((("name", repr(value)),), dict(shown))


def test_every_wanted_argument_must_match() -> None:
    """By name, and by position where there is none."""
    shown = dict(show_arguments([7, "x"], {"eur": True}).named)

    assert matches_arguments((), shown)
    assert matches_arguments((("0", "7"), ("1", "x"), ("eur", "True")), shown)
    assert not matches_arguments((("0", "7"), ("1", "y")), shown)
    assert not matches_arguments((("2", "7"),), shown)
    assert not matches_arguments((("eur", "true"),), shown)


def test_a_filter_of_the_user_is_told_from_none() -> None:
    """A bulk verb without any word is refused."""
    assert Filter().is_everything
    assert Filter(state=None, until=5.0).is_everything
    for wanted in (
        Filter(task="x"),
        Filter(args=(("a", "b"),)),
        Filter(ids=()),
        Filter(since=1.0),
        Filter(message="x"),
    ):
        assert not wanted.is_everything


@pytest.mark.parametrize("value", ['say "hi"', "'quoted'", "a\\b", "tab\there"])
def test_an_argument_with_quotes_matches_as_it_was_passed(value: str) -> None:
    """Only the quotes of its repr are not the value's."""
    shown = show_arguments([], {"name": value}).named

    assert matches_arguments((("name", value),), dict(shown))
