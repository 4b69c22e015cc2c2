"""A message that decodes and is no task message is told, and nothing raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.message import Message
from unit.specimens import a_message

from celery_resilience.delivery.malformed import (
    malformation,
    malformed_call,
    malformed_options,
)

GOOD_BODY: list[Any] = [[7], {"a": 1}, {"callbacks": None, "chain": None}]
GOOD_HEADERS = a_message().headers


def message(
    body: Any = GOOD_BODY, headers: Any = GOOD_HEADERS, raw: bytes | None = None
) -> Message:
    """A kombu message as a worker takes it."""
    made = Message(
        body=json.dumps(body).encode() if raw is None else raw,
        content_type="application/json",
        content_encoding="utf-8",
        accept={"application/json"},
        delivery_info={},
        properties={},
    )
    made.headers = headers
    return made


def headers(**changes: Any) -> dict[str, Any]:
    """Good ones, with changes; None takes one away."""
    merged = {**GOOD_HEADERS, **changes}
    return {k: v for k, v in merged.items() if v is not None}


PROTOCOL_1 = {"task": "t", "id": "i", "args": [], "kwargs": {}}

WELL_FORMED = [
    message(),
    message(headers=headers(timelimit=[300, None])),
    message(headers=headers(timelimit=(1.5, 2))),
    message(headers=headers(timelimit=[None, None])),
    message(headers=headers(retries=3)),
    message(headers={"task": "t", "id": "i"}),
    message(headers=headers(stamped_headers=["s"], stamps={"s": 1})),
    message(headers=headers(unknown=["anything", {}])),
    # the call itself is looked at later
    message(body=[5, 5, 5]),
    # protocol 1, and a mixture that Celery still takes
    message(body=PROTOCOL_1, headers={}),
    message(body=PROTOCOL_1),
]

MALFORMED = [
    (message(headers=[]), "the headers are list, not a mapping"),
    (message(headers="x"), "the headers are str, not a mapping"),
    (message(headers=headers(task=5)), "the task header is int, not a text"),
    (message(headers=headers(task=["t"])), "the task header is list, not a text"),
    (message(headers=headers(id=None)), "the message has no id header"),
    (message(headers=headers(id=[5])), "the message has no id header"),
    (message(headers=headers(timelimit=5)), "the timelimit header is not two numbers"),
    (
        message(headers=headers(timelimit=[1])),
        "the timelimit header is not two numbers",
    ),
    (
        message(headers=headers(timelimit=["1", 2])),
        "the timelimit header is not two numbers",
    ),
    (
        message(headers=headers(retries="many")),
        "the retries header is not a whole number",
    ),
    (message(headers=headers(retries=1.5)), "the retries header is not a whole number"),
    (
        message(headers=headers(stamped_headers=5)),
        "the stamped_headers header is not a list",
    ),
    (message(headers=headers(stamps=[1])), "the stamps header is not a mapping"),
    (message(raw=b""), "the body is bytes, not [args, kwargs, options]"),
    (message(body=None), "the body is NoneType, not [args, kwargs, options]"),
    (message(body=7), "the body is int, not [args, kwargs, options]"),
    (message(body="abc"), "the body is str, not [args, kwargs, options]"),
    (message(body=[1]), "the body is list, not [args, kwargs, options]"),
    (message(body=[[], {}, {}, {}]), "the body is list, not [args, kwargs, options]"),
    (message(body={"a": 1}), "the body is dict, not [args, kwargs, options]"),
    (message(body={"hello": 1}, headers={}), "the message names no task"),
    (message(body=[1], headers={}), "the message names no task"),
    (message(body=None, headers={}), "the message names no task"),
    (
        message(body={**PROTOCOL_1, "task": 5}, headers={}),
        "the task's name is int, not a text",
    ),
    (message(body={"task": "t"}, headers={}), "the message has no task id"),
    (
        message(body={**PROTOCOL_1, "id": [5]}, headers={}),
        "the message has no task id",
    ),
]


@pytest.mark.parametrize("good", WELL_FORMED, ids=range(len(WELL_FORMED)))
def test_a_task_message_has_no_defect(good: Message) -> None:
    """Of either protocol."""
    assert malformation(good) == ""


@pytest.mark.parametrize(
    ("bad", "defect"), MALFORMED, ids=[f"{n}" for n in range(len(MALFORMED))]
)
def test_a_defect_is_named(bad: Message, defect: str) -> None:
    """For the record of the failed task."""
    assert malformation(bad) == defect


@pytest.mark.parametrize("raw", [b"{not json", b'["\xff"]'])
def test_what_does_not_decode_is_not_malformed(raw: bytes) -> None:
    """kombu reports it, with a reason of its own."""
    assert malformation(message(raw=raw)) == ""


def test_content_that_is_refused_is_not_malformed() -> None:
    """It is never decoded."""
    refused = message()
    refused.content_type = "application/x-python-serialize"

    assert malformation(refused) == ""


CALLS: list[tuple[Any, Any, str]] = [
    ([], {}, ""),
    ((1,), {"a": 1}, ""),
    (7, {}, "the positional arguments are int, not a list"),
    (None, {}, "the positional arguments are NoneType, not a list"),
    ({}, {}, "the positional arguments are dict, not a list"),
    ("ab", {}, "the positional arguments are str, not a list"),
    ([], [], "the keyword arguments are list, not a mapping"),
    ([], None, "the keyword arguments are NoneType, not a mapping"),
    ([], "ab", "the keyword arguments are str, not a mapping"),
]


@pytest.mark.parametrize(("args", "kwargs", "defect"), CALLS)
def test_a_call_needs_a_list_and_a_mapping(args: Any, kwargs: Any, defect: str) -> None:
    """Celery would end the worker, or acknowledge it as a success."""
    assert malformed_call(args, kwargs, message()) == defect


@pytest.mark.parametrize(
    ("embed", "defect"),
    [
        ({}, ""),
        (None, ""),
        ("x", "the embedded options are str, not a mapping"),
        ([], "the embedded options are list, not a mapping"),
        (5, "the embedded options are int, not a mapping"),
    ],
)
def test_embedded_options_are_a_mapping(embed: Any, defect: str) -> None:
    """They hold links, chain and chord."""
    assert malformed_call([], {}, message(body=[[], {}, embed])) == defect


def test_a_call_of_protocol_1_has_no_embedded_options() -> None:
    """Its body is a mapping."""
    assert malformed_call([], {}, message(body=PROTOCOL_1, headers={})) == ""


def test_the_headers_of_a_call_are_looked_at_again() -> None:
    """A request may be made of a message that nobody looked at."""
    assert "timelimit" in malformed_call([], {}, message(headers=headers(timelimit=5)))


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=10,
)
known_names = st.sampled_from(
    [
        "task",
        "id",
        "timelimit",
        "retries",
        "stamps",
        "stamped_headers",
        "args",
        "kwargs",
    ]
)
any_table = st.dictionaries(known_names | st.text(max_size=5), any_json, max_size=6)


@given(any_json | any_table, any_table | any_json)
def test_no_payload_and_no_header_raises(body: Any, table: Any) -> None:
    """In the main process an error would end the worker."""
    assert isinstance(malformation(message(body=body, headers=table)), str)


@given(any_json, any_json, any_json, any_table)
def test_no_call_raises(args: Any, kwargs: Any, embed: Any, table: Any) -> None:
    """Whatever three parts a body has."""
    defect = malformed_call(args, kwargs, message([args, kwargs, embed], table))

    assert isinstance(defect, str)
    if isinstance(args, list) and isinstance(kwargs, dict):
        if isinstance(embed, dict | None):
            assert defect == malformed_options(table)
        else:
            assert defect != ""


@given(st.binary(max_size=40), any_table)
def test_no_bytes_raise(raw: bytes, table: dict[str, Any]) -> None:
    """Whether they decode or not."""
    assert isinstance(malformation(message(raw=raw, headers=table)), str)
