"""What makes a message no task message, though it decodes.

Celery reads these parts without a check, in the main process, where the error
ends the worker. Policy only: attribute access, no Celery and no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_resilience.message import id_text


def malformation(message: Any) -> str:
    """
    What is wrong with a message that decodes, or "" when it is a task message.

    Args:
        message: A kombu message; one whose body does not decode is not
            malformed, kombu reports it otherwise.
    """
    headers = message.headers
    if not isinstance(headers, Mapping):
        return f"the headers are {type(headers).__name__}, not a mapping"
    try:
        payload = message.payload
    except Exception:
        return ""
    if "task" in headers:
        return _malformed_headers(headers) or _malformed_body(payload)
    if not isinstance(payload, Mapping) or "task" not in payload:
        return "the message names no task"
    if not isinstance(payload["task"], str):
        return f"the task's name is {type(payload['task']).__name__}, not a text"
    if not id_text(payload.get("id")):
        return "the message has no task id"
    return ""


def _malformed_headers(headers: Mapping[str, Any]) -> str:
    if not isinstance(headers["task"], str):
        return f"the task header is {type(headers['task']).__name__}, not a text"
    if not id_text(headers.get("id")):
        return "the message has no id header"
    return malformed_options(headers)


def malformed_options(headers: Mapping[str, Any]) -> str:
    """What is wrong with the headers that Celery reads without a check, or ""."""
    # For each delivery, in the main process: no unions, which isinstance is slow with.
    limits = headers.get("timelimit")
    if limits is not None and not _is_pair_of_numbers(limits):
        return "the timelimit header is not two numbers"
    retries = headers.get("retries")
    if retries is not None and not isinstance(retries, int):
        return "the retries header is not a whole number"
    stamped = headers.get("stamped_headers")
    if stamped is not None and not isinstance(stamped, (list, tuple)):
        return "the stamped_headers header is not a list"
    stamps = headers.get("stamps")
    if stamps is not None and not isinstance(stamps, Mapping):
        return "the stamps header is not a mapping"
    return ""


def _is_pair_of_numbers(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    hard, soft = value
    return (hard is None or isinstance(hard, (int, float))) and (
        soft is None or isinstance(soft, (int, float))
    )


def _malformed_body(payload: Any) -> str:
    if isinstance(payload, Mapping) and "args" in payload:
        return ""
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        return f"the body is {type(payload).__name__}, not [args, kwargs, options]"
    return ""


def malformed_call(args: Any, kwargs: Any, message: Any) -> str:
    """What is wrong with a decoded call, or "" when a task can be called with it."""
    if not isinstance(args, (list, tuple)):
        return f"the positional arguments are {type(args).__name__}, not a list"
    if not isinstance(kwargs, (dict, Mapping)):
        return f"the keyword arguments are {type(kwargs).__name__}, not a mapping"
    payload = message.payload
    if isinstance(payload, (list, tuple)):
        embedded = payload[2]
        if embedded is not None and not isinstance(embedded, (dict, Mapping)):
            kind = type(embedded).__name__
            return f"the embedded options are {kind}, not a mapping"
    return malformed_options(message.headers)
