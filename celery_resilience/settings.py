"""The `resilience_*` settings: names, units, defaults, checks.

Read once the app is finalized, all at once, so that one start shows every
mistake. Policy only: the caller hands in the configuration as a mapping.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery_resilience.errors import ConfigurationError

PREFIX = "resilience_"

#: Settings of the public contract whose feature this release does not have,
#: with the only value that is accepted for each: the one that asks for nothing.
NOT_IN_THIS_RELEASE: dict[str, Any] = {
    "failed_keep_days": 30,
    "failed_max": 100_000,
    "failed_max_mib": 512,
    "failed_chords": "fail",
    "collect_queues": (),
    "if_store_down": "wait",
    "circuits": {},
    "memory_recycle_mib": None,
    "memory_limit_mib": None,
    "sessions": "auto",
    "metrics_port": None,
    "health_port": None,
    "drain_timeout_s": None,
}


class _Refused(Exception):
    """What is accepted instead, as the end of the sentence "... must be"."""


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _Refused("True or False")


def _text(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise _Refused("a text that is not empty")


def _namespace(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", value):
        return value
    raise _Refused("1 to 64 letters, digits or _ . : -")


def _count(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise _Refused("a whole number from 1")


def _seconds(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise _Refused("a number of seconds above 0")


def _names(value: Any) -> tuple[str, ...]:
    if (
        isinstance(value, list | tuple | set | frozenset)
        and all(isinstance(name, str) and name for name in value)
    ):  # fmt: skip
        return tuple(value)
    raise _Refused("a list of argument names")


def _routes(value: Any) -> tuple[tuple[str, str | None], ...]:
    if isinstance(value, Mapping) and all(
        isinstance(pattern, str)
        and pattern
        and (queue is None or (isinstance(queue, str) and queue))
        for pattern, queue in value.items()
    ):
        return tuple(value.items())
    raise _Refused(
        "a dict {task glob, exception name or reason: queue name, or None to drop}"
    )


def _folder(value: Any) -> Path:
    if isinstance(value, str | Path) and str(value):
        return Path(value)
    raise _Refused("the path of a folder")


def _log_format(value: Any) -> str:
    if value in ("json", "logfmt"):
        return str(value)
    raise _Refused('"json", "logfmt" or None')


#: Kinds of store, by the start of their URL, with the URL to write.
STORES = {
    "postgresql": "postgresql+psycopg://user:password@host/database",
    "sqlite": "sqlite:////absolute/path/failed.sqlite3",
}


def _store_url(value: Any) -> str:
    kind = urlsplit(value).scheme.split("+")[0] if isinstance(value, str) else ""
    if kind in STORES:
        return str(value)
    raise _Refused("one of " + ", ".join(STORES.values()))


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _setting(default: Any, check: Callable[[Any], Any], doc: str) -> Any:
    return field(default=default, metadata={"check": check, "doc": doc})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one app, checked. Each is `resilience_` and its name here."""

    enabled: bool = _setting(True, _boolean, "False makes everything plain Celery.")
    namespace: str = _setting(
        "celery",
        _namespace,
        "Prefix of every key, row and queue, so that apps may share a broker and a "
        "store. Default: the app's name.",
    )
    store_url: str | None = _setting(
        None,
        _optional(_store_url),
        "Where failed tasks are kept. Default: the result backend if it is a "
        "database, else SQLite beside the app if the broker is local, else none.",
    )
    create_schema: bool = _setting(
        True, _boolean, "Create the store's tables on first use."
    )
    failed_queue: str = _setting(
        "", _text, 'The failed queue. Default: "{namespace}.failed".'
    )
    failed_routes: tuple[tuple[str, str | None], ...] = _setting(
        (),
        _routes,
        "{task glob, exception name or reason: queue, or None to drop}; first match.",
    )
    collect_failed: bool = _setting(
        False, _boolean, "This worker also runs the collector, as -B runs beat."
    )
    spool_dir: Path | None = _setting(
        None,
        _optional(_folder),
        "Folder that takes envelopes while the broker does not. "
        "None: their messages stay unacknowledged.",
    )
    redact: tuple[str, ...] = _setting(
        (), _names, "Names of arguments that are never shown or logged."
    )
    max_crashes: int = _setting(
        3, _count, "Runs that may kill their process before the task is failed."
    )
    crash_window_s: float = _setting(
        259_200.0, _seconds, "Older crashes of a task are forgotten."
    )
    log_format: str | None = _setting(
        None, _optional(_log_format), "How the record of a failed task is written."
    )
    release: str | None = _setting(
        None, _optional(_text), "The app's release, kept with each failed task."
    )


def read_settings(
    conf: Mapping[str, Any], *, prefix: str = "", app_name: str | None = None
) -> Settings:
    """
    Check every `resilience_*` setting of an app.

    Args:
        conf: The app's configuration, `app.conf`.
        prefix: The namespace the app's configuration was given with, such as
            "CELERY_" in Django.
        app_name: The app's name, which is the default namespace.

    Raises:
        ConfigurationError: Some are wrong; the message names each, with its
            value and what is accepted.
    """
    known = {f.name: f for f in fields(Settings)}
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in _resilience_keys(conf, prefix).items():
        if name in known:
            try:
                values[name] = known[name].metadata["check"](value)
            except _Refused as refused:
                wrong.append(f"{PREFIX}{name} must be {refused}, got {value!r}")
        elif name in NOT_IN_THIS_RELEASE:
            if value != NOT_IN_THIS_RELEASE[name]:
                wrong.append(
                    f"{PREFIX}{name} is not in this release of celery-resilience: "
                    f"remove it, got {value!r}"
                )
        else:
            wrong.append(_unknown(name, [*known, *NOT_IN_THIS_RELEASE]))
    if wrong:
        raise ConfigurationError("; ".join(wrong))
    if "namespace" not in values:
        values["namespace"] = default_namespace(app_name)
    if "failed_queue" not in values:
        values["failed_queue"] = f"{values['namespace']}.failed"
    return Settings(**values)


def default_namespace(app_name: str | None) -> str:
    """The app's name without what a key, row or queue could not hold."""
    cleaned = re.sub(r"[^A-Za-z0-9_.:-]", "-", app_name or "")[:64]
    return cleaned if cleaned and cleaned != "__main__" else "celery"


def _resilience_keys(conf: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The names (without "resilience_") that the user wrote, with their values."""
    found: dict[str, Any] = {}
    for key in list(conf):
        name = key.lower()
        if prefix and name.startswith(prefix.lower()):
            name = name[len(prefix) :]
        if name.startswith(PREFIX):
            name = name[len(PREFIX) :]
            found[name] = conf.get(PREFIX + name, conf.get(key))
    return found


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    guess = f", did you mean {PREFIX}{near[0]}?" if near else ""
    return f"unknown setting {PREFIX}{name}{guess}"


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """Where an app's failed tasks are kept, and why there."""

    url: str | None
    why: str


#: Brokers whose messages never leave this host.
LOCAL_BROKERS = frozenset({"filesystem", "memory", "sqla", "sqlalchemy"})


def choose_store(
    settings: Settings, *, broker_url: str, result_backend: str | None, app_dir: Path
) -> StoreChoice:
    """
    Find the store of an app from what it already has.

    Args:
        settings: The app's settings.
        broker_url: The broker that the app writes to.
        result_backend: The app's result backend as it is configured.
        app_dir: The folder beside which a local store is put.
    """
    if settings.store_url:
        return StoreChoice(settings.store_url, "resilience_store_url")
    backend = result_backend or ""
    if backend.startswith("db+"):
        backend = backend[3:]
        kind = urlsplit(backend).scheme.split("+")[0]
        if kind in STORES:
            return StoreChoice(backend, "the result backend")
    transport = broker_url.split("://")[0].split("+")[0]
    if transport in LOCAL_BROKERS:
        path = app_dir / f"{settings.namespace}.resilience.sqlite3"
        return StoreChoice(f"sqlite:///{path}", f"beside the app, as {transport} is")
    return StoreChoice(
        None,
        f"none: set resilience_store_url ({' or '.join(STORES.values())}); until "
        "then failed tasks stay in their queue",
    )


def without_password(url: str) -> str:
    """A URL as it may be logged."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return url.replace(f":{parts.password}@", f":{'*' * 3}@", 1)
