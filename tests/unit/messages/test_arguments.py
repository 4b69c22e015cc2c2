"""What a serializer does not take is found, and named with what to pass instead."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_resilience.messages.arguments import MOST, changed_keys, culprit

scalars = st.none() | st.booleans() | st.integers() | st.text()
sent = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


class Base(DeclarativeBase):
    """Of one table."""


class Order(Base):
    """What somebody passes to a task."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


def in_json(value: Any) -> bool:
    """Whether the standard library's JSON takes it."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def generated() -> Any:
    """A generator."""
    yield 1


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({1}, "is set: pass a sorted list"),
        (generated(), "is generator: pass a list of what it yields"),
        (io.BytesIO(), "is _io.BytesIO: pass the path of the file, or what is in it"),
        (print, "pass a name by which the task finds it"),
        (Order(id=7), "Order: pass its primary key, and load it in the task"),
        (object(), "is object: pass numbers, texts, lists and dicts"),
    ],
    ids=["set", "generator", "file", "function", "model", "object"],
)
def test_the_culprit_is_named_and_what_to_pass(value: Any, told: str) -> None:
    """However deep it is, and never with what is in it."""
    outer = {"orders": [0, {"of": value}]}

    by_name = culprit((1,), {"book": outer}, in_json)
    by_position = culprit((1, outer), {}, in_json)

    assert str(by_name).startswith("book['orders'][1]['of'] is ")
    assert str(by_position).startswith("args[1]['orders'][1]['of'] is ")
    assert told in str(by_name)
    assert told in str(by_position)


@given(st.lists(sent, max_size=3), st.dictionaries(st.text(), sent, max_size=3))
def test_what_is_taken_has_no_culprit(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Nothing is refused that would arrive as it is."""
    assert culprit(args, kwargs, in_json) is None
    assert changed_keys(args, kwargs, "json") is None


@given(sent, st.integers() | st.none() | st.booleans())
def test_a_key_that_becomes_a_text_is_found(value: Any, key: Any) -> None:
    """JSON has no other keys; what would arrive is another mapping."""
    told = changed_keys((value,), {"counts": [{key: 1}]}, "json")

    assert told is not None
    assert told.startswith(f"counts[0] has the key {key!r}")
    assert changed_keys((value,), {"counts": [{key: 1}]}, "pickle") is None


def test_what_comes_after_hides_no_key() -> None:
    """However much it is: it is looked for in the order of the arguments."""
    told = changed_keys(([[{1: 2}]], [0] * (2 * MOST)), {}, "json")

    assert str(told).startswith("args[0][0][0] has the key 1")


def test_the_search_ends() -> None:
    """Large arguments do not hold their sender up."""
    looked = 0

    def can_be_sent(value: Any) -> bool:
        nonlocal looked
        looked += 1
        return True

    assert culprit(([0] * (2 * MOST),), {}, can_be_sent) is None
    assert looked <= MOST
