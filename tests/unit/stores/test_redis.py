"""The client below every store in Redis: versions, processes, errors, clusters."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from services import Service
from unit.specimens import a_failed_document, fresh_name

from celery_resilience.errors import SchemaMismatch, StoreUnavailable
from celery_resilience.failed.filters import Filter
from celery_resilience.failed.redis_store import RedisFailedTaskStore
from celery_resilience.stores.redis import RedisServer

WITHOUT_REDIS = """
import sys
sys.modules["redis"] = None
from celery_resilience.errors import MissingExtra
from celery_resilience.stores.redis import RedisServer
try:
    RedisServer("redis://h", "shop").ready("failed", 1)
except MissingExtra as exc:
    print(exc)
"""

fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def url(servers: Any) -> str:
    """A private Redis."""
    found: str = servers("redis").url
    return found


@pytest.fixture
def open_server(url: str) -> Iterator[Callable[..., RedisServer]]:
    """Opens servers, and closes them after the test."""
    opened: list[RedisServer] = []

    def open_it(url: str = url, namespace: str | None = None) -> RedisServer:
        server = RedisServer(url, namespace or fresh_name("shop"))
        opened.append(server)
        return server

    yield open_it
    for server in opened:
        server.close()


def test_every_key_of_an_app_has_its_hash_tag(
    open_server: Callable[..., RedisServer], url: str
) -> None:
    """So that a cluster keeps them in one slot, and two apps' keys apart."""
    server = open_server(namespace="tagged")
    RedisFailedTaskStore(server).keep([a_failed_document(task_id="a", at=1.0)])

    with redis.Redis.from_url(url) as client:
        keys = list(client.scan_iter("*tagged*"))

    assert len(keys) > 5
    assert all(key.startswith(b"{celery-resilience:tagged}:") for key in keys)


@pytest.mark.parametrize(
    ("found", "advice"), [(7, "upgrade celery-resilience here"), (0, ": upgrade")]
)
def test_another_version_is_refused(
    open_server: Callable[..., RedisServer], url: str, found: int, advice: str
) -> None:
    """With both versions, and what to do; nothing is touched."""
    server = open_server(namespace="versions")
    with redis.Redis.from_url(url) as client:
        client.set("{celery-resilience:versions}:schema:failed", found)

        with pytest.raises(SchemaMismatch) as refused:
            RedisFailedTaskStore(server).keep([a_failed_document(task_id="a", at=1.0)])

        assert client.keys("{celery-resilience:versions}:failed:*") == []
    assert f"of version {found}" in str(refused.value)
    assert advice in str(refused.value)


def test_a_child_has_connections_of_its_own(
    open_server: Callable[..., RedisServer],
) -> None:
    """A forked one never answers on its parent's."""
    server = open_server()
    store = RedisFailedTaskStore(server)
    store.keep([a_failed_document(task_id="a", at=1.0)])
    reader, writer = fork.Pipe(duplex=False)

    def in_child() -> None:
        with server.client() as client:
            writer.send((store.count(Filter(state=None)), client.client_id()))

    child = fork.Process(target=in_child)
    child.start()
    child.join()

    with server.client() as client:
        assert reader.recv()[0] == 1
        assert store.count(Filter(state=None)) == 1
        own = client.client_id()
    assert own is not None


def test_a_connection_that_died_while_it_was_idle_is_replaced(
    open_server: Callable[..., RedisServer], url: str
) -> None:
    """Before a command is sent over it."""
    store = RedisFailedTaskStore(open_server())
    store.keep([a_failed_document(task_id="a", at=1.0)])
    with redis.Redis.from_url(url) as client:
        client.client_kill_filter(_type="normal", skipme=True)

    assert store.count(Filter(state=None)) == 1


def test_a_server_that_went_away_says_so_and_is_found_again(
    own_server: Callable[[str], Service],
) -> None:
    """Nothing is known while it is away."""
    service = own_server("redis")
    store = RedisFailedTaskStore(RedisServer(service.url, "shop"))
    store.keep([a_failed_document(task_id="a", at=1.0)])
    service.kill()
    with pytest.raises(StoreUnavailable):
        store.count(Filter())
    service.start()
    store.keep([a_failed_document(task_id="b", at=1.0)])
    assert {s.task_id for s in store.list(Filter())} >= {"b"}


def test_a_wrong_password_is_refused_and_not_shown(
    own_server: Callable[[str], Service],
) -> None:
    """The refusal goes to logs and screens."""
    service = own_server("redis")
    with redis.Redis.from_url(service.url) as client:
        client.config_set("requirepass", "another")
    server = RedisServer(service.url.replace("://", "://:hunter2@"), "shop")

    with pytest.raises(StoreUnavailable) as refused:
        server.ready("failed", 1)

    assert "hunter2" not in str(refused.value)
    assert ":***@127.0.0.1" in str(refused.value)


def test_a_server_that_is_full_takes_nothing_and_says_so(
    own_server: Callable[[str], Service],
) -> None:
    """With noeviction: what is kept stays."""
    service = own_server("redis")
    store = RedisFailedTaskStore(RedisServer(service.url, "shop"))
    store.keep([a_failed_document(task_id="a", at=1.0)])
    with redis.Redis.from_url(service.url) as client:
        client.config_set("maxmemory", "1mb")

    with pytest.raises(StoreUnavailable, match="maxmemory"):
        store.keep([a_failed_document(task_id="b", at=1.0)])
    with pytest.raises(StoreUnavailable, match="maxmemory"):
        store.check()

    assert [s.task_id for s in store.list(Filter())] == ["a"]


@pytest.mark.parametrize(
    ("policy", "is_told"),
    [("allkeys-lru", True), ("volatile-lru", False), ("noeviction", False)],
)
def test_a_server_that_evicts_failed_tasks_is_told_of(
    own_server: Callable[[str], Service],
    caplog: pytest.LogCaptureFixture,
    policy: str,
    is_told: bool,
) -> None:
    """Once a process; keys without a time to live are not volatile."""
    service = own_server("redis")
    with redis.Redis.from_url(service.url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", policy)
    server = RedisServer(service.url, "shop")

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            server.ready("failed", 1)

    told = [r for r in caplog.records if "maxmemory-policy" in r.getMessage()]
    assert len(told) == int(is_told)


@pytest.mark.parametrize(
    ("url", "library_url", "options"),
    [
        ("redis://:p@h:1/2", {"host": "h", "port": 1, "db": 2}, {}),
        (
            "redis+socket:///run/r.sock?virtual_host=3",
            {"path": "/run/r.sock", "db": 3},
            {},
        ),
        (
            "rediss://h/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=/ca.pem",
            {"host": "h", "ssl_ca_certs": "/ca.pem", "ssl_cert_reqs": "required"},
            {},
        ),
        ("rediss://h", {"host": "h", "ssl_certfile": "/c"}, {"ssl_certfile": "/c"}),
    ],
)
def test_urls_are_read_as_celery_writes_them(
    url: str, library_url: dict[str, Any], options: dict[str, Any]
) -> None:
    """Sockets and TLS included; a command is never sent twice."""
    server = RedisServer(url, "shop", tls=options)

    with server.client() as client:
        keywords = client.connection_pool.connection_kwargs

    assert library_url.items() <= keywords.items()
    calls: list[int] = []

    def lost() -> None:
        calls.append(1)
        raise redis.ConnectionError

    with pytest.raises(redis.ConnectionError):
        keywords["retry"].call_with_retry(lost, lambda *_: None)
    assert len(calls) == 1


def test_a_cluster_keeps_an_apps_keys_in_one_slot(
    own_server: Callable[[str], Service],
) -> None:
    """Every script runs there, through `redis+cluster://`."""
    server = RedisServer(own_server("redis-cluster").url, "shop")
    store = RedisFailedTaskStore(server)
    store.keep([a_failed_document(task_id=f"t{n}", at=1.0 + n) for n in range(3)])
    ids = [summary.id for summary in store.list(Filter())]
    (claim, *_) = store.claim(ids)
    store.mark_sent([(claim, None)])

    assert store.start(claim.id, token=claim.token, copy="c")
    assert store.stats()["replaying"] == 3
    assert store.resolve("t1")
    assert len(store.remove([*store.kept(ids)])) == 3
    server.close()


def test_a_missing_library_is_told_with_its_extra() -> None:
    """Not as an ImportError of somebody else's."""
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c"),
            WITHOUT_REDIS,
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "pip install 'celery-resilience[redis]'" in done.stdout
