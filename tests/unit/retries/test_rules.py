"""Which rule is for what a body raises, and which rules are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience import (
    CircuitOpen,
    ConfigurationError,
    Never,
    On,
    ResilienceError,
    Skip,
    Snooze,
)
from celery_resilience.retries.rules import (
    Rule,
    members_of,
    reaches,
    rule_for,
    wrong_rules,
)


class Refused(ConnectionError):
    """Of the app's own."""


def caused(exc: Exception, cause: BaseException) -> Exception:
    """*exc*, raised from *cause*."""
    exc.__cause__ = cause
    return exc


LINE = On(ConnectionError)
BAD = Never(ValueError)


@pytest.mark.parametrize(
    ("exc", "rules", "found"),
    [
        (ConnectionError(), (LINE, BAD), LINE),
        (Refused(), (LINE, BAD), LINE),
        (ValueError(), (LINE, BAD), BAD),
        (KeyError(), (LINE, BAD), None),
        (OSError(), (LINE,), None),
        (Refused(), (On(Refused), LINE), "Refused"),
        (caused(KeyError(), ConnectionError()), (BAD, LINE), LINE),
        (caused(KeyError(), caused(OSError(), ValueError())), (LINE, BAD), BAD),
        # What was raised is looked up before what it was raised from.
        (caused(ValueError(), ConnectionError()), (LINE, BAD), BAD),
        (caused(ConnectionError(), ValueError()), (BAD, LINE), LINE),
    ],
)
def test_the_first_rule_counts_and_then_the_cause(
    exc: Exception, rules: tuple[Rule, ...], found: Any
) -> None:
    """The exception itself before what it was raised from."""
    rule = rule_for(exc, rules)

    assert (rule.label if rule and isinstance(found, str) else rule) == found


def test_what_was_being_handled_says_nothing() -> None:
    """A bug in a handler is not the failure that it was handling."""
    try:
        try:
            raise ConnectionError
        except ConnectionError:
            raise KeyError  # noqa: B904 -- that is what is looked at
    except KeyError as exc:
        found = rule_for(exc, [LINE])

    assert found is None


def test_a_chain_that_is_a_circle_ends() -> None:
    """Python lets one be made."""
    one, two = KeyError(), IndexError()
    one.__cause__, two.__cause__ = two, one

    assert rule_for(one, [LINE]) is None
    assert set(members_of(one)) == {one, two}


GROUP = ExceptionGroup


@pytest.mark.parametrize(
    ("exc", "found"),
    [
        (GROUP("", [ConnectionError(), Refused()]), LINE),
        (GROUP("", [ConnectionError(), ValueError()]), BAD),
        (GROUP("", [KeyError(), GROUP("", [ValueError()])]), BAD),
        (GROUP("", [ConnectionError(), KeyError()]), None),
        (GROUP("", [caused(KeyError(), ConnectionError())]), LINE),
        (caused(KeyError(), GROUP("", [ConnectionError()])), LINE),
        (BaseExceptionGroup("", [KeyboardInterrupt(), ConnectionError()]), None),
    ],
)
def test_one_member_that_is_never_tried_again_decides_for_its_group(
    exc: BaseException, found: Rule | None
) -> None:
    """One without a rule too; else the first rule."""
    assert rule_for(exc, [LINE, BAD]) is found


def test_a_group_has_a_rule_where_it_is_named() -> None:
    """A rule for Exception asks for its members."""
    named, wide = Never(ExceptionGroup), On(Exception)
    group = ExceptionGroup("", [KeyError()])

    assert rule_for(group, [named, wide]) is named
    assert rule_for(group, [wide]) is wide
    assert rule_for(ExceptionGroup("", [Skip()]), [wide]) is None


@pytest.mark.parametrize(
    "exc",
    [
        *(Retry(), Ignore(), Reject("x"), Skip(), Snooze(1), SoftTimeLimitExceeded()),
        *(CircuitOpen("open"), ResilienceError()),
        caused(Retry(), ConnectionError()),
        caused(ResilienceError(), ConnectionError()),
    ],
)
def test_a_rule_for_all_exceptions_leaves_what_steers_celery_alone(
    exc: Exception,
) -> None:
    """And soft limits, open circuits and what else is ours."""
    assert rule_for(exc, [On(Exception), LINE]) is None


@pytest.mark.parametrize(
    ("exc", "named"),
    [
        (SoftTimeLimitExceeded(), SoftTimeLimitExceeded),
        (SoftTimeLimitExceeded(), "SoftTimeLimitExceeded"),
        (CircuitOpen("open"), CircuitOpen),
        (CircuitOpen("open"), "celery_resilience.CircuitOpen"),
        (CircuitOpen("open"), ResilienceError),
    ],
)
def test_they_have_a_rule_where_they_are_named(exc: Exception, named: Any) -> None:
    """Before or behind one for all exceptions."""
    rule = On(named)

    assert rule_for(exc, [On(Exception), rule]) is rule


def test_nothing_that_steers_celery_is_had_by_its_name() -> None:
    """A retry that was sent is not sent once more."""
    assert rule_for(Retry(), [On("Retry"), On("celery.exceptions.Retry")]) is None


@pytest.mark.parametrize(
    ("name", "is_meant"),
    [
        ("ConnectionError", True),
        ("OSError", True),
        ("Refused", True),
        (f"{__name__}.Refused", True),
        ("json.JSONDecodeError", False),
        ("elsewhere.Refused", False),
        ("TimeoutError", False),
    ],
)
def test_names_are_for_classes_and_their_bases(name: str, is_meant: bool) -> None:
    """Nothing is imported for them."""
    assert (rule_for(Refused(), [On(name)]) is not None) == is_meant


def test_a_class_has_the_name_by_which_its_package_offers_it() -> None:
    """`json.JSONDecodeError` is one of `json.decoder`."""
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("{")

    assert rule_for(raised.value, [On("json.JSONDecodeError")]) is not None
    assert rule_for(raised.value, [On("json.decoder.JSONDecodeError")]) is not None


EXCEPTIONS = st.deferred(
    lambda: (
        st.builds(
            caused,
            st.sampled_from([KeyError, ValueError, Refused, SoftTimeLimitExceeded]).map(
                lambda kind: kind()
            ),
            st.none() | EXCEPTIONS,
        )
        | st.builds(
            lambda members: ExceptionGroup("", members),
            st.lists(EXCEPTIONS, min_size=1, max_size=3),
        )
    )
)


@given(EXCEPTIONS)
def test_a_group_with_one_that_is_never_tried_again_never_is(exc: Exception) -> None:
    """However deep it is, and whatever stands beside it."""
    group = ExceptionGroup("", [exc, ValueError()])

    assert isinstance(rule_for(group, [LINE, BAD]), Never)


# --- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: On(), "On() needs at least one exception"),
        (lambda: Never(), "Never() needs at least one exception"),
        (lambda: On(BaseException), "On() takes exceptions (subclasses of Exception)"),
        (lambda: On(KeyboardInterrupt), "got <class 'KeyboardInterrupt'>"),
        (lambda: On(ConnectionError()), "got ConnectionError()"),  # type: ignore[arg-type]
        (lambda: On("no name"), "got 'no name'"),
        (lambda: Never(""), "Never() takes exceptions"),
        (lambda: On(Retry), "On(Retry): it steers Celery, and is no failure"),
        (lambda: Never(Skip), "Never(Skip): it steers Celery"),
        (
            lambda: On(OSError, attempts=0),
            "On(OSError): attempts must be a whole number",
        ),
        (lambda: On(OSError, attempts=True), "from 1, or None, got True"),
        (lambda: On(OSError, attempts=2.5), "got 2.5"),  # type: ignore[arg-type]
        (
            lambda: On(OSError, backoff_s=0),
            "backoff_s must be a number of seconds above",
        ),
        (lambda: On(OSError, backoff_s=-1), "got -1"),
        (lambda: On(OSError, backoff_s=(0, 5)), "got (0, 5)"),
        (lambda: On(OSError, backoff_s=(5, 1)), "a pair of such: (least, most), got"),
        (lambda: On(OSError, backoff_s=(1, 2, 3)), "got (1, 2, 3)"),  # type: ignore[arg-type]
        (lambda: On(OSError, backoff_s=float("nan")), "got nan"),
        (lambda: On(OSError, backoff_s=604_801), "at most a week"),
        (lambda: On(OSError, backoff_s="1"), "got '1'"),  # type: ignore[arg-type]
        (lambda: On(OSError, deadline_s=0), "deadline_s must be a number of seconds"),
        (lambda: On(OSError, deadline_s=1e9), "at most 30 days"),
        (lambda: On(OSError, attempts=None), "it would be tried again for ever"),
        (lambda: On(OSError, budget=""), "budget must be a name of 1 to 64 characters"),
        (lambda: On(OSError, budget="x" * 65), "or None, got 'xxx"),
        (
            lambda: On(OSError, attempt=3),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
            "unknown option attempt, did you mean attempts? (it takes attempts, backof",
        ),
        (
            lambda: Never(OSError, attempts=3),  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
            "Never(): unknown option attempts (it takes none)",
        ),
    ],
)
def test_a_wrong_rule_is_refused_where_it_is_written(
    make: Callable[[], Rule], said: str
) -> None:
    """With the rule, the option, what is accepted and the value."""
    with pytest.raises(ConfigurationError) as refused:
        make()

    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (On(OSError), "must be a tuple of On(...) and Never(...), got On(OSError)"),
        ([OSError], "got [<class 'OSError'>]"),
        (None, "got None"),
        ({On(OSError)}, "must be a tuple"),
        (
            [On(OSError), Never(Refused)],
            "Never(Refused) is never asked for Refused: On(OSError) comes before it",
        ),
        ([On(OSError), On(KeyError, OSError)], "never asked for OSError"),
        ([On("Refused"), On(Refused)], "never asked for Refused"),
        ([On("a.b"), Never("a.b")], "never asked for a.b"),
        ([Never(Exception), On(ExceptionGroup, OSError)], "asked for OSError"),
    ],
)
def test_rules_that_are_none_or_never_asked_are_refused(rules: Any, said: str) -> None:
    """The one behind is what its author believes in."""
    assert said in str(wrong_rules(rules))


@pytest.mark.parametrize(
    "rules",
    [
        (),
        [],
        (On(Refused), On(OSError), Never(Exception)),
        (On(Exception), On(SoftTimeLimitExceeded), Never(CircuitOpen, ExceptionGroup)),
        (On("a.b"), Never("b")),
        (On(Exception), On("a.b")),
        (Never(MaxRetriesExceededError), On(Exception)),
    ],
)
def test_rules_that_may_all_be_asked_are_accepted(rules: Any) -> None:
    """Also where they overlap."""
    assert wrong_rules(rules) is None


def test_a_rule_reaches_what_it_decides_for() -> None:
    """By which it is known that another is idle."""
    assert reaches(On(OSError), Refused)
    assert not reaches(On(Refused), OSError)
    assert not reaches(On(Exception), "a.b")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (On(OSError), "OSError: at most 8 attempts, 1 to 300 s apart"),
        (
            On(OSError, "a.b", attempts=None, deadline_s=3600, backoff_s=5),
            "OSError, a.b: within 3600 s, 5 s apart",
        ),
        (
            On(OSError, attempts=2, deadline_s=60.5, budget="bank"),
            "OSError: at most 2 attempts, within 60.5 s, 1 to 300 s apart, budget bank",
        ),
        (Never(ValueError, KeyError), "ValueError, KeyError: never"),
    ],
)
def test_a_rule_says_itself(rule: Rule, said: str) -> None:
    """For `celery resilience explain`."""
    assert str(rule) == said


def test_a_rule_has_the_same_key_in_each_process_and_another_than_others() -> None:
    """Messages go by it, whatever order a deploy gives the rules."""
    assert On(OSError, attempts=3).key == On(OSError).key == Never(OSError).key
    assert len({On(OSError).key, On(KeyError).key, On(OSError, KeyError).key}) == 3
