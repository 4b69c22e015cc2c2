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
from celery_resilience.finite import is_finite
from celery_resilience.memory_amount import MEMORY_AMOUNT, is_memory_amount
from celery_resilience.redaction import without_password
from celery_resilience.task_options import TaskOptions

PREFIX = "resilience_"

#: Settings of the public contract whose feature this release does not have,
#: with the only value that is accepted for each: the one that asks for nothing.
NOT_IN_THIS_RELEASE: dict[str, Any] = {
    "failed_chords": "fail",
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
    if is_finite(value) and value > 0:
        return float(value)
    raise _Refused("a number of seconds above 0")


def _days(value: Any) -> float:
    if is_finite(value) and value > 0:
        return float(value)
    raise _Refused("a number of days above 0, or None")


def _mib(value: Any) -> float:
    if is_finite(value) and value >= 1:
        return float(value)
    raise _Refused("a number of MiB from 1, or None")


def _memory(value: Any) -> float | str:
    if is_memory_amount(value):
        return value if isinstance(value, str) else float(value)
    raise _Refused(f"{MEMORY_AMOUNT}, or None")


def _names(value: Any) -> tuple[str, ...]:
    if (
        isinstance(value, list | tuple | set | frozenset)
        and all(isinstance(name, str) and name for name in value)
    ):  # fmt: skip
        return tuple(value)
    raise _Refused("a list of argument names")


def _queues(value: Any) -> tuple[str, ...]:
    if (
        isinstance(value, list | tuple | set | frozenset)
        and all(isinstance(name, str) and name for name in value)
    ):  # fmt: skip
        return tuple(dict.fromkeys(value))
    raise _Refused("a list of queue names")


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


def _address(value: Any) -> tuple[str, int]:
    """A host, "" for every address of this one, and a port."""
    host, _, port = str(value).rpartition(":")
    if (
        not isinstance(value, bool)
        and isinstance(value, int | str)
        and re.fullmatch(r"[0-9]{1,5}", port)
        and 1 <= int(port) <= 65_535
        and re.fullmatch(r"[A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+\]", host)
        and (host or ":" not in str(value))
    ):
        return host.strip("[]"), int(port)
    raise _Refused('a port from 1 to 65535, or "host:port"')


def address(value: Any) -> tuple[str, int]:
    """
    The host ("" for every address) and port of *value*, a port or "host:port".

    Raises:
        ValueError: It is neither.
    """
    try:
        return _address(value)
    except _Refused as refused:
        raise ValueError(f"must be {refused}, got {value!r}") from None


def _circuits(value: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    if isinstance(value, Mapping) and all(
        isinstance(name, str)
        and 1 <= len(name) <= 64
        and isinstance(options, Mapping)
        and all(isinstance(option, str) for option in options)
        for name, options in value.items()
    ):
        return tuple((name, dict(options)) for name, options in value.items())
    raise _Refused("a dict {name of 1 to 64 characters: {option: value}}")


def _folder(value: Any) -> Path:
    if isinstance(value, str | Path) and str(value):
        return Path(value)
    raise _Refused("the path of a folder")


def _log_format(value: Any) -> str:
    if value in ("json", "logfmt"):
        return str(value)
    raise _Refused('"json", "logfmt" or None')


def _if_store_down(value: Any) -> str:
    if value in ("wait", "run"):
        return str(value)
    raise _Refused('"wait" or "run"')


def _sessions(value: Any) -> str:
    if value in ("auto", "strict", "off"):
        return str(value)
    raise _Refused('"auto", "strict" or "off"')


#: Kinds of store, by the start of their URL, with the URL to write.
STORES = {
    "redis": "redis://:password@host:6379/0",
    "postgresql": "postgresql+psycopg://user:password@host/database",
    "mysql": "mysql+pymysql://user:password@host/database",
    "mariadb": "mariadb+pymysql://user:password@host/database",
    "sqlite": "sqlite:////absolute/path/failed.sqlite3",
}


def _store_url(value: Any) -> str:
    if isinstance(value, str) and _is_store_url(value):
        return value
    if isinstance(value, str) and (file := _with_two_slashes(value)):
        raise _Refused(
            f"written with three slashes, sqlite:///{file}, or four before an absolute "
            "path"
        )
    raise _Refused("one of " + ", ".join(STORES.values()))


def _with_two_slashes(url: str) -> str:
    """The file of a SQLite URL that has it in the place of a host; or ""."""
    kind, _, rest = url.partition("://")
    is_host = kind.split("+")[0] == "sqlite" and not rest.startswith(("/", ":", "?"))
    return rest if is_host else ""


def _is_store_url(url: str) -> bool:
    kind, sign, _ = url.partition("://")
    try:
        urlsplit(url).port  # noqa: B018 -- raises where it is no number
    except ValueError:
        return False
    path = sqlite_path(url)
    if path is not None and path.name in ("", ":memory:"):
        return False  # each process would have one of its own
    if _with_two_slashes(url):
        return False
    return bool(sign) and (kind.split("+")[0] in STORES or kind == "rediss")


def sqlite_path(url: str) -> Path | None:
    """The file of a SQLite store; None for another store."""
    kind, _, rest = url.partition("://")
    if kind.split("+")[0] != "sqlite":
        return None
    return Path(rest.partition("?")[0].removeprefix("/"))


def _with_absolute_path(url: str, folder: Path) -> str:
    """The URL of a SQLite store whose path is one for every process."""
    path = sqlite_path(url.removeprefix("db+"))
    if path is None or path.is_absolute():
        return url
    start, _, query = url.partition("?")
    start = start.partition("://")[0]
    return f"{start}:///{folder / path}" + (f"?{query}" if query else "")


def is_redis(url: str) -> bool:
    """Whether a store's or a broker's URL is one of Redis."""
    return url.partition("://")[0].split("+")[0] in ("redis", "rediss")


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
        "Where failed tasks are kept. Default: the broker if it is Redis, else the "
        "result backend if it is a database, else SQLite beside the app if the broker "
        "is local, else none.",
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
    failed_keep_days: float | None = _setting(
        30.0,
        _optional(_days),
        "Days after its last failure that a failed task stays in the store. Older ones "
        "go to the archive. None: for ever.",
    )
    failed_max: int | None = _setting(
        100_000,
        _optional(_count),
        "Failed tasks of each failed queue in the store; the oldest above go to the "
        "archive. None: any number.",
    )
    failed_max_mib: float | None = _setting(
        512.0,
        _optional(_mib),
        "MiB of each failed queue in the store; the oldest above go to the archive. "
        "None: any size.",
    )
    failed_archive_dir: Path | None = _setting(
        None,
        _optional(_folder),
        "Folder of the archive, on the host that collects. "
        'Default: "{namespace}.failed-archive" beside the app.',
    )
    collect_failed: bool = _setting(
        False, _boolean, "This worker also runs the collector, as -B runs beat."
    )
    collect_queues: tuple[str, ...] = _setting(
        (),
        _queues,
        "Dead-letter queues of the broker that are collected too.",
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
    if_store_down: str = _setting(
        "wait",
        _if_store_down,
        "What a task with an idempotency key does while the store is away: wait for it, "
        "or run without its key.",
    )
    circuits: tuple[tuple[str, dict[str, Any]], ...] = _setting(
        (),
        _circuits,
        "{name: {failure_rate, window_s, min_calls, consecutive, slow_call_s, open_s, "
        "max_open_s, jitter, probes, probe_lease_s, release_per_s, ramp_from, "
        "queues, exclude}}, each optional.",
    )
    retry_budgets: tuple[tuple[str, dict[str, Any]], ...] = _setting(
        (),
        _circuits,
        "{name: {share, per_s, most}}, each optional: what retry rules with that budget "
        "may spend.",
    )
    crash_window_s: float = _setting(
        259_200.0, _seconds, "Older crashes of a task are forgotten."
    )
    drain_timeout_s: float | None = _setting(
        None,
        _optional(_seconds),
        "Seconds from the first signal until what still runs is cut off. "
        "None: until idle.",
    )
    health_port: tuple[str, int] | None = _setting(
        None,
        _optional(_address),
        "Answers /live and /ready over HTTP there: a port on every address, or "
        '"host:port".',
    )
    metrics_port: tuple[str, int] | None = _setting(
        None,
        _optional(_address),
        "Shows metrics to Prometheus at /metrics there: a port on every address, or "
        '"host:port"; the health port\'s, too.',
    )
    memory_recycle_mib: float | str | None = _setting(
        None,
        _optional(_memory),
        "What a child may gain in its life before it is recycled, between two tasks; a "
        "share is one of the container's memory. None: any amount.",
    )
    memory_limit_mib: float | str | None = _setting(
        None,
        _optional(_memory),
        "What one run may take before it fails as memory_limit; a share is one of the "
        "container's memory. None: any amount.",
    )
    sessions: str = _setting(
        "auto",
        _sessions,
        "What becomes of what a task leaves behind in a database: undone and told of; "
        'with "strict" the task that left it is failed, too; with "off" nothing.',
    )
    log_format: str | None = _setting(
        None,
        _optional(_log_format),
        "How our records, and lines in Celery's own format, are written.",
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
        ConfigurationError: Some are wrong; the message names each as it was
            written, with its value and what is accepted.
    """
    known = {f.name: f for f in fields(Settings)}
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for name, (key, value) in _resilience_keys(conf, prefix).items():
        if name in known:
            try:
                values[name] = known[name].metadata["check"](value)
            except _Refused as refused:
                shown = without_password(value) if isinstance(value, str) else value
                wrong.append(f"{key} must be {refused}, got {shown!r}")
        elif name in NOT_IN_THIS_RELEASE:
            unset = NOT_IN_THIS_RELEASE[name]
            if value != unset and (value or unset):
                wrong.append(
                    f"{key} is not in this release of celery-resilience: "
                    f"remove it, got {value!r}"
                )
        else:
            wrong.append(_unknown(key, name, [*known, *NOT_IN_THIS_RELEASE]))
    if wrong:
        raise ConfigurationError("; ".join(wrong))
    if "namespace" not in values:
        values["namespace"] = default_namespace(app_name)
    if "failed_queue" not in values:
        values["failed_queue"] = f"{values['namespace']}.failed"
    return Settings(**values)


def is_enabled(conf: Mapping[str, Any], *, prefix: str = "") -> bool:
    """Whether an app has us on, where its settings are not checked yet."""
    _, value = _resilience_keys(conf, prefix).get("enabled", ("", True))
    return value is not False


def default_namespace(app_name: str | None) -> str:
    """The app's name without what a key, row or queue could not hold."""
    cleaned = re.sub(r"[^A-Za-z0-9_.:-]", "-", app_name or "")[:64]
    return cleaned if cleaned and cleaned != "__main__" else "celery"


def _resilience_keys(
    conf: Mapping[str, Any], prefix: str
) -> dict[str, tuple[str, Any]]:
    """The names (without "resilience_"), as the user wrote each, and its value."""
    found: dict[str, tuple[str, Any]] = {}
    for key in list(conf):
        name = key.lower()
        if prefix and name.startswith(prefix.lower()):
            name = name[len(prefix) :]
        elif prefix and key.isupper():
            continue  # another library's, in the same module of settings
        if name.startswith(PREFIX):
            name = name[len(PREFIX) :]
            found[name] = key, conf.get(PREFIX + name, conf.get(key))
    return found


def _unknown(key: str, name: str, known: list[str]) -> str:
    if name in TaskOptions.__annotations__:
        return f"{key} is no setting: {name} is an option of a task"
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        return f"unknown setting {key}"
    start = key[: len(key) - len(name)]
    meant = near[0].upper() if start.isupper() else near[0]
    return f"unknown setting {key}, did you mean {start}{meant}?"


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """
    Where an app's failed tasks are kept, and why there.

    Attributes:
        tls: What redis-py needs to know of TLS, where that is the broker's.
    """

    url: str | None
    why: str
    tls: Mapping[str, Any] | None = None


#: Brokers whose messages never leave this host.
LOCAL_BROKERS = frozenset({"filesystem", "memory"})


def choose_store(
    settings: Settings,
    *,
    broker_url: str,
    result_backend: str | None,
    app_dir: Path,
    broker_tls: Any = None,
) -> StoreChoice:
    """
    Find the store of an app from what it already has.

    Args:
        settings: The app's settings.
        broker_url: The broker that the app writes to.
        result_backend: The app's result backend as it is configured.
        app_dir: The folder beside which a local store is put.
        broker_tls: The app's `broker_use_ssl`.
    """
    if settings.store_url:
        url = _with_absolute_path(settings.store_url, app_dir)
        return StoreChoice(url, "resilience_store_url")
    if is_redis(broker_url):
        # Of several, which are for when the first is away, the first.
        url = broker_url.split(";")[0]
        if broker_tls:
            url = re.sub("^redis://", "rediss://", url)
        tls = broker_tls if isinstance(broker_tls, Mapping) else None
        return StoreChoice(url, "the broker", tls)
    backend = _with_absolute_path(result_backend or "", app_dir)
    if backend.startswith("db+"):
        backend = backend[3:]
        if _is_store_url(backend):
            return StoreChoice(backend, "the result backend")
    transport, _, database = broker_url.partition("://")[0].partition("+")
    if transport in LOCAL_BROKERS or database == "sqlite":
        path = app_dir / f"{settings.namespace}.resilience.sqlite3"
        return StoreChoice(f"sqlite:///{path}", f"beside the app, as {transport} is")
    return StoreChoice(
        None,
        f"set resilience_store_url ({' or '.join(STORES.values())}); until then failed "
        "tasks stay in their queue",
    )
