"""Servers and fleets for the tests; see `services.py` for where servers come from."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "apps")]

from fleet_runner import Fleet
from services import PROVIDERS, SERVICES, Missing, Service

# A shell that runs tests in the background lets all that they start ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Brokers that the fleets run on, with the server of each.
BROKERS = {
    "redis": "redis",
    "rabbitmq": "rabbitmq",
    "rabbitmq-quorum": "rabbitmq",
    "filesystem": None,
}


#: Servers of this process that were started and not removed.
RUNNING: list[Service] = []


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Service]]:
    """Shared servers by name, started when they are first asked for."""
    started: dict[str, Service] = {}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Service:
            if name not in started:
                started[name] = start_server(name)
                stack.callback(remove_server, started[name])
            return started[name]

        yield get


def provide(name: str) -> str:
    """How a server, or promtool, can be had; where it cannot, skip, or fail in CI."""
    try:
        return PROVIDERS[name]()
    except Missing as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"missing {exc}")


def start_server(name: str) -> Service:
    """A private server; where there is none, skip, or fail in CI."""
    provide(name)
    server = SERVICES[name]()
    RUNNING.append(server)
    try:
        server.start()
    except BaseException:
        remove_server(server)
        raise
    return server


def remove_server(server: Service) -> None:
    """End a server; an error where it has ended by itself."""
    RUNNING.remove(server)
    server.remove()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[
    None, pytest.TestReport, pytest.TestReport
]:
    """Beside what fails stands which server has ended, and why."""
    report = yield
    if report.failed:
        report.sections.extend(deaths(RUNNING))
    return report


def deaths(servers: Iterable[Service]) -> Iterator[tuple[str, str]]:
    """A section of a report for each server that has ended by itself."""
    for server in servers:
        if death := server.death():
            yield f"{server.name} has ended", death


@pytest.fixture
def own_server() -> Iterator[Callable[[str], Service]]:
    """Servers that the test may kill."""
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Service:
            server = start_server(name)
            stack.callback(remove_server, server)
            return server

        yield get


def conf_for(
    broker: str, folder: Path, server: Service | None, **more: Any
) -> dict[str, Any]:
    """
    Celery's settings for a fleet that shares nothing with another on its server.

    Args:
        broker: A key of `BROKERS`.
        folder: For files: the filesystem broker, the SQLite store.
        server: The broker's server.
        more: Other settings, which win.
    """
    name = f"fleet{uuid4().hex[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    conf: dict[str, Any] = {
        "task_default_queue": name,
        "resilience_namespace": name,
        "resilience_store_url": f"sqlite:///{folder}/store.sqlite3",
        "broker_connection_retry_on_startup": True,
        "worker_lost_wait": 1.0,
        # Celery kills a child that is not up after four seconds of a busy machine.
        "worker_proc_alive_timeout": 60.0,
        "worker_prefetch_multiplier": 1,
        "result_expires": 3600,
    }
    if broker == "filesystem":
        queue, processed = folder / "queue", folder / "processed"
        queue.mkdir(exist_ok=True)
        processed.mkdir(exist_ok=True)
        conf.update(
            broker_url="filesystem://",
            broker_transport_options={
                "data_folder_in": str(queue),
                "data_folder_out": str(queue),
                "processed_folder": str(processed),
                "control_folder": str(folder / "control"),
            },
            result_backend=f"file://{folder}/results",
        )
        (folder / "results").mkdir(exist_ok=True)
    elif broker == "redis":
        assert server is not None
        conf.update(
            broker_url=server.url,
            broker_transport_options={"global_keyprefix": f"{name}:"},
            result_backend=server.url[:-1] + "1",
            resilience_store_url=None,  # the broker
        )
    else:
        assert server is not None
        conf.update(
            broker_url=server.url,
            result_backend=f"file://{folder}/results",
            broker_transport_options={"confirm_publish": True},
        )
        (folder / "results").mkdir(exist_ok=True)
        if broker == "rabbitmq-quorum":
            conf.update(
                task_default_queue_type="quorum",
                task_default_exchange_type="topic",
                worker_detect_quorum_queues=True,
            )
    conf.update(more)
    return conf


FleetMaker = Callable[..., Fleet]


@pytest.fixture
def make_fleet(
    servers: Callable[[str], Service], tmp_path: Path
) -> Iterator[FleetMaker]:
    """Makes fleets: `make_fleet("redis", store="mariadb", task_acks_late=True)`."""
    with contextlib.ExitStack() as stack:
        count = iter(range(1000))

        def make(
            broker: str,
            *,
            is_plain: bool = False,
            server: Service | None = None,
            store: str = "sqlite",
            **more: Any,
        ) -> Fleet:
            if store != "sqlite":
                more["resilience_store_url"] = servers(store).url
            name = BROKERS[broker]
            if server is None and name is not None:
                server = servers(name)
            folder = tmp_path / f"fleet{next(count)}"
            fleet = Fleet(
                folder, conf_for(broker, folder, server, **more), is_plain=is_plain
            )
            stack.callback(fleet.close)
            return fleet

        yield make
