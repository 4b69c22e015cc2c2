"""Keys are made of arguments, and no two effects share one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.errors import ConfigurationError, NoKey
from celery_resilience.idempotency.canonical import (
    NoCanonicalForm,
    canonical,
    is_stable,
)
from celery_resilience.idempotency.key import MAX_NAME, KeyMaker, store_key
from celery_resilience.idempotency.registered import received_key


def maker(spec: Any, body: Callable[..., Any]) -> KeyMaker:
    """Of a task called shop.charge."""
    return KeyMaker(spec, inspect.signature(body), "shop.charge")


def charge(order_id: Any, amount: Any = 10) -> None:
    """A body."""


def name(spec: Any, *args: Any, **kwargs: Any) -> str:
    """The name of one call's key."""
    made = maker(spec, charge).make(args, kwargs)
    assert made is not None
    return made.name


# --- templates ------------------------------------------------------------------------


def test_a_template_names_the_effect() -> None:
    """As it is written, so that people and providers can read it."""
    assert name("charge:{order_id}", 17) == "charge:17"
    assert name("charge:{order_id}", "A-17") == "charge:A-17"


def test_a_number_is_no_text() -> None:
    """1 and "1" are two orders."""
    assert name("charge:{order_id}", 1) != name("charge:{order_id}", "1")
    assert name("charge:{order_id}", True) != name("charge:{order_id}", "true")
    assert name("charge:{order_id}", None) != name("charge:{order_id}", "null")
    assert name("charge:{order_id}", 1) != name("charge:{order_id}", True)
    assert name("charge:{order_id}", 1) != name("charge:{order_id}", 1.0)


def test_positions_names_and_defaults_are_alike() -> None:
    """`f(1)`, `f(order_id=1)` and `f(1, amount=10)` are one call."""
    made = [
        maker("charge:{order_id}", charge).make(args, kwargs)
        for args, kwargs in (
            ((1,), {}),
            ((), {"order_id": 1}),
            ((1,), {"amount": 10}),
            ((1, 10), {}),
            ((), {"amount": 10, "order_id": 1}),
        )
    ]

    assert len(set(made)) == 1


def test_all_arguments_make_a_key() -> None:
    """True: the same arguments, the same effect."""
    assert name(True, 1) == name(True, 1, amount=10)
    assert name(True, 1) != name(True, 1, amount=11)
    assert name(True, 1).startswith("shop.charge:")


def test_a_callable_makes_a_key() -> None:
    """It is called as the body is."""

    def spec(order_id: int, amount: int = 10) -> str:
        return f"{order_id}/{amount}"

    assert name(spec, 1, amount=3) == "1/3"


def test_a_callable_may_say_that_a_call_has_no_key() -> None:
    """None is an answer; nothing else but a text is."""
    assert maker(lambda **_: None, charge).make((), {"order_id": 1}) is None
    for wrong in ("", 17, b"x"):
        with pytest.raises(NoKey, match=r"shop\.charge returned"):
            maker(lambda order_id, it=wrong: it, charge).make((1,), {})


@pytest.mark.parametrize(
    "spec", [lambda order_id: "", lambda order_id, amount: "charge:" + order_id]
)
def test_a_callable_that_is_wrong_makes_no_call_a_call_without_a_key(spec: Any) -> None:
    """It raises TypeError, as it does for arguments that the body does not take."""
    with pytest.raises(NoKey, match=r"shop\.charge raised TypeError\("):
        received_key(maker(spec, charge), (1, 10), {})


@pytest.mark.parametrize(
    "template",
    [
        "charge:{order}",
        "charge:{order_id.__class__}",
        "charge:{order_id[0]}",
        "charge:{order_id!r}",
        "charge:{order_id:>10}",
        "charge:{}",
        "charge:{0}",
        "charge:{order_id",
        "charge:}",
        "",
    ],
)
def test_a_bad_template_is_refused(template: str) -> None:
    """Where it is registered; the message says what is accepted."""
    with pytest.raises(ConfigurationError, match="order_id, amount") as refused:
        maker(template, charge)

    assert template in str(refused.value)


@pytest.mark.parametrize("spec", [17, b"x", False, ["x"]])
def test_a_key_of_another_type_is_refused(spec: Any) -> None:
    """The message names the option."""
    with pytest.raises(ConfigurationError, match="idempotency_key must be"):
        maker(spec, charge)


def test_braces_may_be_doubled() -> None:
    """As in any template of Python's."""
    assert name("{{x}}{order_id}", 1) == "{x}1"


def test_keywords_without_a_name_may_be_used() -> None:
    """Where the body takes any; one that is missing is told by name."""

    def body(**more: Any) -> None: ...

    found = maker("x:{tenant}", body)

    made = found.make((), {"tenant": "a", "other": 1})
    assert made is not None
    assert made.name == "x:a"
    with pytest.raises(NoKey, match="no argument 'tenant'"):
        found.make((), {})


def test_arguments_that_the_body_does_not_take_make_no_key() -> None:
    """Celery, or the body, says so in its own words."""
    for args, kwargs in (
        ((), {}),
        ((1, 2, 3), {}),
        ((1,), {"order_id": 1}),
        ((1,), {"nonsense": 1}),
    ):
        with pytest.raises(TypeError) as refused:
            maker("charge:{order_id}", charge).make(args, kwargs)
        assert not isinstance(refused.value, NoKey)


@pytest.mark.parametrize("odd", ["\ud800", "\ud800" * 300])
def test_a_key_of_any_text_can_be_sent(odd: str) -> None:
    """AMQP has no header with half a character; the key stays its own."""
    made = name("charge:{order_id}", odd)

    assert made.encode()
    assert len(made) <= MAX_NAME
    shown = odd.encode(errors="backslashreplace").decode()
    assert made not in [name("charge:{order_id}", o) for o in ("\ud801", shown)]


def test_a_long_key_is_cut_and_stays_its_own() -> None:
    """Stores and providers take no more; the rest is a digest of it all."""
    one, other = name("x:{order_id}", "y" * 999), name("x:{order_id}", "y" * 998)

    assert len(one) <= MAX_NAME
    assert one[:200] == other[:200]
    assert one != other


texts = st.text(alphabet='ab1:"\\<>{}- \u20ac', max_size=6)
values = st.one_of(texts, st.integers(), st.none(), st.booleans(), st.floats(0, 9))


@pytest.mark.parametrize(
    "template", ["{a}{b}", "{a}:{b}", "{a}-{b}", "{a}_{b}", "{a} {b}", "x{a}<{b}>"]
)
@given(st.tuples(values, values), st.tuples(values, values))
def test_no_argument_imitates_another(
    template: str, one: tuple[Any, Any], other: tuple[Any, Any]
) -> None:
    """Whatever they contain, two calls with other arguments have two names."""

    def body(a: Any, b: Any) -> None: ...

    found = maker(template, body)
    first, second = found.make(one, {}), found.make(other, {})

    assert first is not None
    assert second is not None
    assert (first.name == second.name) == (canonical(one) == canonical(other))


@given(texts, texts, texts, texts)
def test_two_tasks_never_share_a_key(a: str, b: str, c: str, d: str) -> None:
    """Nor two apps in one store."""
    assert (store_key("shop", a, b) == store_key("shop", c, d)) == ((a, b) == (c, d))
    assert store_key("shop", a, b) != store_key("shop2", a, b)


def test_what_is_hidden_is_not_in_a_name() -> None:
    """Nor what may hold it: a digest stands for the value."""

    def body(card: Any, order: Any) -> None: ...

    hidden = KeyMaker(
        "{card}:{order}", inspect.signature(body), "x", lambda name: name == "card"
    )
    made = [
        hidden.make((card, order), {})
        for card in ("4111", 4111)
        for order in ({"pin": "9876"}, {"pin": 9876}, ["9876"])
    ]

    names = [key.name for key in made if key is not None]
    assert len(set(names)) == len(names) == 6
    assert not any("4111" in name or "9876" in name for name in names)


# --- fingerprints ---------------------------------------------------------------------


def test_the_fingerprint_is_of_all_arguments() -> None:
    """So that a key that belongs to another call is noticed."""
    found = maker("charge:{order_id}", charge)
    one, other = found.make((1, 10), {}), found.make((1, 11), {})

    assert one is not None
    assert other is not None
    assert one.name == other.name
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("spec", ["{a}", True])
def test_a_parameter_that_is_added_with_a_default_changes_no_call(spec: Any) -> None:
    """A duplicate may have been sent before the app was deployed anew."""

    def before(a: int, b: list[int] | None = None) -> None: ...

    def after(
        a: int,
        b: list[int] | None = None,
        *more: int,
        c: Any = 1,
        d: Any = (),
        **_: Any,
    ) -> None: ...

    old, new = maker(spec, before), maker(spec, after)

    assert new.make((1,), {}) == old.make((1,), {})
    assert new.make((1, [2]), {"c": 1, "d": []}) == old.make((1, [2]), {})
    others: list[dict[str, Any]] = [
        *({"c": 2}, {"c": True}, {"c": 1.0}, {"c": "1"}, {"c": None}),
        *({"d": [1]}, {"e": None}),
    ]
    made = [new.make((1,), kwargs) for kwargs in [{}, *others]]
    assert len({key.fingerprint for key in made if key is not None}) == len(made)


def test_a_default_may_have_no_canonical_form() -> None:
    """It is none of the call's arguments."""

    def body(a: int, b: Any = print) -> None: ...

    made = maker(True, body)
    one, other = made.make((1,), {}), made.make((2,), {})
    assert one == made.make((), {"a": 1})
    assert one != other
    assert one is not None
    assert one.fingerprint
    with pytest.raises(NoKey, match="'b' holds a object"):
        made.make((1,), {"b": object()})


def test_what_has_no_canonical_form_is_not_compared() -> None:
    """As long as the key needs it not; else the message says what to do."""
    thing = object()
    made = maker("charge:{order_id}", charge).make((1, thing), {})

    assert made is not None
    assert made.fingerprint == ""
    for spec in (True, "charge:{amount}"):
        with pytest.raises(NoKey, match="'amount' holds a object, which has no one"):
            maker(spec, charge).make((1, thing), {})


# --- canonical form -------------------------------------------------------------------

NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)

DIFFERENT = [
    None,
    True,
    False,
    0,
    1,
    1.0,
    0.5,
    "1",
    "",
    "n",
    b"1",
    [],
    [1],
    ["1"],
    [[1], 2],
    [1, [2]],
    {},
    {"1": 1},
    {1: 1},
    {"a": 1, "b": 2},
    {"a": {"b": 2}},
    {1, 2},
    {"ab"},
    {"a", "b"},
    NOON,
    NOON.replace(tzinfo=None),
    date(2026, 11, 2),
    time(12),
    timedelta(seconds=1),
    Decimal(1),
    Decimal("1.0"),
    UUID(int=1),
    "00000000-0000-0000-0000-000000000001",
]


def test_different_values_have_different_forms() -> None:
    """Of any two types."""
    forms = [canonical(value) for value in DIFFERENT]

    assert len(set(forms)) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({2, 1}, frozenset({1, 2})),
        (0.0, -0.0),
        (b"x", bytearray(b"x")),
        (NOON, NOON.astimezone(timezone(timedelta(hours=5)))),
    ],
)
def test_equal_values_have_one_form(one: Any, other: Any) -> None:
    """Whatever order or type a serializer gives them."""
    assert canonical(one) == canonical(other)


def test_a_moment_that_utc_does_not_have_has_no_form() -> None:
    """The last one of the calendar, west of Greenwich."""
    with pytest.raises(NoCanonicalForm):
        canonical(datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), Decimal("NaN")]
)
def test_what_has_no_form_is_told_by_type(value: Any) -> None:
    """And never by its value."""
    with pytest.raises(NoCanonicalForm, match=r"^a "):
        canonical([value])


@pytest.mark.parametrize("value", DIFFERENT)
def test_what_is_stable_survives_json(value: Any) -> None:
    """What is not goes through the serializer before its key is made."""
    from celery_resilience.serialization import deserialized, serialized

    if is_stable(value):
        content_type, encoding, data = serialized(value, "json")
        back = deserialized(content_type, encoding, data, accept=["json"])
        assert canonical(back) == canonical(value)
    else:
        assert type(value) not in (str, int, bool, type(None))
