"""What the verbs of `celery -A shop resilience circuits` do.

Data on stdout, talk on stderr. Exit codes: 0 done, 1 there is no such circuit, 2 usage or
refused, 4 store unreachable, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

from celery_resilience.circuits import policy
from celery_resilience.circuits.policy import Forced, State
from celery_resilience.circuits.store import CircuitStore, Stored
from celery_resilience.errors import (
    ConfigurationError,
    MissingExtra,
    SchemaMismatch,
    StoreUnavailable,
)
from celery_resilience.install import Installation, installation_of
from celery_resilience.redaction import printable

DONE, NOT_FOUND, REFUSED, UNREACHABLE, INTERRUPTED = 0, 1, 2, 4, 130

COLUMNS = ("NAME", "STATE", "FORCED", "UNTIL (UTC)", "CALLS", "FAILURES", "OPENINGS")

Words = Mapping[str, Any]


def run(app: Any, verb: str, words: Words, *, with_traceback: bool = False) -> int:
    """
    Run one verb.

    Args:
        app: The Celery app.
        verb: "list", "open", "close", "reset", "disable" or "shadow".
        words: Its options and arguments.
        with_traceback: Say also where a refusal comes from.

    Returns:
        The exit code.
    """
    try:
        app.loader.import_default_modules()
        installation = installation_of(app)
        if verb == "list":
            code = _list(installation, words)
        else:
            code = _change(installation, verb, words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except (ConfigurationError, MissingExtra, SchemaMismatch) as exc:
        _say_where(exc, with_traceback)
        say(f"{exc}")
        return REFUSED
    except StoreUnavailable as exc:
        _say_where(exc, with_traceback)
        say(f"unreachable: {exc}")
        return UNREACHABLE


def say(text: str) -> None:
    """Talk to the operator, on stderr."""
    print(printable(text, keep_newlines=True), file=sys.stderr, flush=True)


def changed(verb: str, state: State, options: Any, now: float, for_s: float) -> State:
    """
    The state after a verb.

    Args:
        verb: What an operator says.
        state: What is so before.
        options: The circuit's.
        now: By the store's clock.
        for_s: Seconds for which it holds.
    """
    if verb == "open":
        return policy.forced(state, Forced.OPEN, now=now, for_s=for_s)
    if verb == "disable":
        return policy.forced(state, Forced.DISABLED, now=now, for_s=for_s)
    if verb == "shadow":
        return policy.forced(state, Forced.SHADOW, now=now, for_s=for_s)
    if verb == "close" and state.forced is not Forced.OPEN:
        return policy.closed(state, now=now)
    return policy.forced(policy.closed(state, now=now), None, now=now)


def to_dict(name: str, state: State, now: float) -> dict[str, Any]:
    """A circuit as JSON has it."""
    word = state.forced_at(now)
    is_open = state.position is policy.Position.OPEN
    return {
        "schema": 1,
        "name": name,
        "state": str(state.position),
        "forced": None if word is None else str(word),
        "forced_until": _time(state.forced_until) if word else None,
        "opened_at": _time(state.opened_at) if state.opened_at else None,
        "retry_at": _time(state.retry_at) if is_open else None,
        "calls": state.calls,
        "failures": state.failures,
        "openings": state.openings,
        "probes": sum(now < lease.until for lease in state.leases),
        "generation": state.generation,
    }


def _list(installation: Installation, words: Words) -> int:
    store = _store_of(installation)
    names = _names(installation, store)
    answer = store.read(names) if names else None
    documents = []
    for name in names:
        assert answer is not None
        state = State.from_text(answer.found.get(name, Stored()).text)
        documents.append(to_dict(name, state, answer.now))
    if words["output"] == "json":
        print(json.dumps(documents, indent=2))
        return DONE
    if not documents:
        say("no circuit is named by a setting or a task, and none is in the store")
        return DONE
    print("\t".join(COLUMNS))
    for it in documents:
        until = it["forced_until"] or it["retry_at"] or "-"
        cells = (it["name"], it["state"], it["forced"] or "-", until[:19])
        counts = (it["calls"], it["failures"], it["openings"])
        print("\t".join(printable(str(cell)) for cell in (*cells, *counts)))
    return DONE


def _change(installation: Installation, verb: str, words: Words) -> int:
    name: str = words["name"]
    names = _names(installation, _store_of(installation))
    if name not in names:
        near = get_close_matches(name, names, n=1)
        say(f"no circuit {name!r}" + (f", did you mean {near[0]}?" if near else ""))
        return NOT_FOUND
    for_s = float(words.get("for_s") or policy.FORCED_S)
    circuits = installation.circuits
    circuit = circuits.get(name)

    def change(state: State, now: float) -> tuple[State, State]:
        after = changed(verb, state, circuit.options, now, for_s)
        return after, after

    after = circuits.order(circuit, change)
    word = after.forced_at(circuit.store_now())
    if word is None:
        say(f"{name}: {after.position}")
    else:
        say(f"{name}: {word} until {_time(after.forced_until)}")
    return DONE


def _names(installation: Installation, store: CircuitStore) -> list[str]:
    """The circuits that a setting or a task names, and those in the store."""
    tasks = installation.app.tasks.values()
    named = (getattr(task, "circuit_name", None) for task in tasks)
    by_tasks = {name for name in named if isinstance(name, str)}
    return sorted({*installation.circuit_options(), *by_tasks, *store.names()})


def _store_of(installation: Installation) -> CircuitStore:
    store: CircuitStore | None = installation.circuit_store()
    if store is None:
        raise ConfigurationError(f"there is no store: {installation.store_choice.why}")
    return store


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _say_where(exc: Exception, with_traceback: bool) -> None:
    if with_traceback:
        say("".join(traceback.format_exception(exc)))
