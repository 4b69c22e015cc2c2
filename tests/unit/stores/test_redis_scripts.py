"""Scripts over connections that are kept: what is never sent twice, read late or shared."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from services import Service
from tcp_proxy import Proxy, proxy_to, url_through
from unit.specimens import fresh_name

from celery_resilience.errors import StoreUnavailable
from celery_resilience.stores import redis as stores_redis
from celery_resilience.stores.redis import RedisServer
from celery_resilience.stores.redis_scripts import KEPT

fork = multiprocessing.get_context("fork")

#: Each adds to a list what it was given, and answers with it.
SOURCES = {
    "echo": "redis.call('RPUSH', KEYS[1], ARGV[1]) return {ARGV[1], #ARGV}",
    "refuse": "return redis.error_reply('ERR ' .. ARGV[1])",
}

IN_GREEN_THREADS = """
from gevent import monkey
monkey.patch_all()
import sys
from gevent.pool import Pool
from celery_resilience.stores import redis
redis._source = lambda *_: "return {ARGV[1]}"
server = redis.RedisServer(sys.argv[1], "green")

def work(number):
    for n in range(20):
        word = f"{number}-{n}"
        if server.run("room", "echo", word) != [word.encode()]:
            return False
    return True

print("right" if all(list(Pool(30).imap(work, range(30)))) else "wrong")
"""


@pytest.fixture(scope="module")
def service(servers: Any) -> Service:
    """A private Redis."""
    found: Service = servers("redis")
    return found


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of no room."""
    monkeypatch.setattr(stores_redis, "_source", lambda _, script: SOURCES[script])


@pytest.fixture
def open_server() -> Iterator[Callable[..., RedisServer]]:
    """Opens servers, and closes them after the test."""
    opened: list[RedisServer] = []

    def open_it(url: str, **limits: float) -> RedisServer:
        opened.append(RedisServer(url, fresh_name("shop"), **limits))
        return opened[-1]

    yield open_it
    for server in opened:
        server.close()


@pytest.fixture
def proxied(
    service: Service, open_server: Callable[..., RedisServer]
) -> Iterator[tuple[RedisServer, Proxy]]:
    """A server that is reached through a proxy, and has been."""
    with proxy_to(service) as proxy:
        server = open_server(url_through(proxy, service.url), answer_s=0.5)
        echo(server, "first")
        yield server, proxy


def echo(server: RedisServer, word: Any) -> Any:
    """What Redis answers with, as text."""
    answer = server.run("room", "echo", word)
    return answer[0].decode()


def told(server: RedisServer) -> list[str]:
    """Every word that a script was given, in turn."""
    with server.client() as client:
        return [word.decode() for word in client.lrange(server.prefix("room"), 0, -1)]


def connections(service: Service) -> int:
    """How many connections Redis has, but for the one that asks."""
    with redis.Redis.from_url(service.url) as client:
        return len(client.client_list(_type="normal")) - 1


@pytest.mark.parametrize(
    "word", ["a", "", "zwei\r\nZeilen", "€", 7, 0.25, 1e-7, "x" * 1_000_000]
)
def test_words_arrive_as_redis_py_sends_them(
    service: Service, open_server: Callable[..., RedisServer], word: Any
) -> None:
    """Texts of any length and numbers alike."""
    server = open_server(service.url)
    with redis.Redis.from_url(service.url) as client:
        expected = client.eval("return ARGV[1]", 0, word)

    assert server.run("room", "echo", word, b"\0\xff")[0] == expected
    assert server.run("room", "echo", word, b"\0\xff")[1] == 2


def test_a_word_that_is_none_is_refused_before_it_is_sent(
    service: Service, open_server: Callable[..., RedisServer]
) -> None:
    """As redis-py does; the connection serves the next call."""
    server = open_server(service.url)

    for word in (None, True, object()):
        with pytest.raises(TypeError):
            server.run("room", "echo", word)

    assert echo(server, "a") == "a"
    assert told(server) == ["a"]


def test_a_server_that_restarted_meanwhile_is_told_once(
    own_server: Callable[[str], Service], open_server: Callable[..., RedisServer]
) -> None:
    """The connection is known to be dead before anything is sent; the script is gone."""
    service = own_server("redis")
    server = open_server(service.url)
    echo(server, "first")
    service.kill()
    service.start()

    assert echo(server, "second") == "second"
    assert told(server).count("second") == 1


def test_a_server_that_is_away_says_so_and_is_found_again(
    own_server: Callable[[str], Service], open_server: Callable[..., RedisServer]
) -> None:
    """However many connections it had."""
    service = own_server("redis")
    server = open_server(service.url)
    echo(server, "first")
    service.kill()
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            echo(server, "away")
    service.start()

    assert echo(server, "second") == "second"


def test_a_script_that_redis_forgot_is_loaded_again(
    service: Service, open_server: Callable[..., RedisServer]
) -> None:
    """And done once."""
    server = open_server(service.url)
    echo(server, "a")
    with server.client() as client:
        client.script_flush()

    assert echo(server, "b") == "b"
    assert told(server) == ["a", "b"]


def test_a_call_whose_answer_is_lost_is_not_sent_again(
    proxied: tuple[RedisServer, Proxy],
) -> None:
    """It may have been done, as here."""
    server, proxy = proxied
    proxy.cut_answer_to(b"lost")
    with pytest.raises(StoreUnavailable):
        echo(server, "lost")

    assert proxy.has_cut_answer
    assert echo(server, "next") == "next"
    assert told(server) == ["first", "lost", "next"]


def test_a_late_answer_is_not_the_next_calls(
    proxied: tuple[RedisServer, Proxy],
) -> None:
    """A connection on which an answer may come yet is not used again."""
    server, proxy = proxied
    proxy.slow_down(0.8)
    with pytest.raises(StoreUnavailable, match=r"[Tt]imeout"):
        echo(server, "late")
    proxy.slow_down(0.0)

    assert echo(server, "next") == "next"


class Interrupted(BaseException):
    """As a soft time limit comes: from a signal, wherever the process is."""


@pytest.mark.parametrize("error", [Interrupted, RuntimeError])
def test_an_answer_that_nobody_waited_for_is_not_the_next_calls(
    service: Service,
    open_server: Callable[..., RedisServer],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """Whatever ended the wait."""
    server = open_server(service.url)
    echo(server, "first")
    is_first = True
    read = redis.Connection.read_response

    def interrupted(connection: Any, *args: Any, **options: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            raise error
        return read(connection, *args, **options)

    monkeypatch.setattr(redis.Connection, "read_response", interrupted)
    with pytest.raises(error):
        echo(server, "interrupted")

    assert echo(server, "next") == "next"


def test_what_was_said_on_an_idle_connection_is_no_answer(
    service: Service, open_server: Callable[..., RedisServer]
) -> None:
    """It is closed, with what is in it."""
    server = open_server(service.url)
    echo(server, "first")
    runner: Any = server._runner
    runner._idle[0].send_command("ECHO", "of nobody")

    with server.client() as client:
        client.ping()
    assert echo(server, "next") == "next"


def test_a_refusal_leaves_the_connection_in_use(
    service: Service, open_server: Callable[..., RedisServer]
) -> None:
    """Its answer has been read."""
    server = open_server(service.url)
    echo(server, "first")
    runner: Any = server._runner
    before = runner._idle[0]

    with pytest.raises(StoreUnavailable, match="as told"):
        server.run("room", "refuse", "as told")

    assert list(runner._idle) == [before]
    assert echo(server, "next") == "next"


def test_a_password_and_a_database_are_used(
    own_server: Callable[[str], Service], open_server: Callable[..., RedisServer]
) -> None:
    """On these connections too; a wrong password is not shown."""
    service = own_server("redis")
    with redis.Redis.from_url(service.url) as client:
        client.config_set("requirepass", "right")
    at = service.url.partition("://")[2].partition("/")[0]
    server = open_server(f"redis://:right@{at}/3")

    assert echo(server, "a") == "a"
    assert told(server) == ["a"]
    with pytest.raises(StoreUnavailable) as refused:
        echo(open_server(f"redis://:hunter2@{at}/3"), "a")
    assert "hunter2" not in str(refused.value)


def test_a_forked_child_has_connections_of_its_own(
    service: Service, open_server: Callable[..., RedisServer]
) -> None:
    """Its parent's go on as if nothing had happened."""
    server = open_server(service.url)
    echo(server, "first")
    runner: Any = server._runner
    before = runner._idle[0]
    reader, writer = fork.Pipe(duplex=False)

    def in_child() -> None:
        writer.send([echo(server, f"child {n}") for n in range(20)])

    child = fork.Process(target=in_child)
    child.start()
    own = [echo(server, f"parent {n}") for n in range(20)]
    answers = reader.recv() if reader.poll(10) else "none"
    child.kill()
    child.join()

    assert own == [f"parent {n}" for n in range(20)]
    assert answers == [f"child {n}" for n in range(20)]
    assert list(runner._idle) == [before]
    assert sorted(told(server)) == sorted(["first", *own, *answers])


def test_threads_have_their_own_answers(
    service: Service, open_server: Callable[..., RedisServer]
) -> None:
    """A connection is used by one at a time, and no more are kept than a few."""
    server = open_server(service.url)
    wrong: list[str] = []
    together = threading.Barrier(2 * KEPT)

    def work(thread: int) -> None:
        together.wait()
        for n in range(50):
            word = f"{thread}-{n}"
            if echo(server, word) != word:
                wrong.append(word)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2 * KEPT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert len(set(told(server))) == 2 * KEPT * 50
    runner: Any = server._runner
    assert 1 <= len(runner._idle) <= KEPT


def test_green_threads_have_their_own_answers(service: Service) -> None:
    """A switch comes wherever one waits for Redis."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", IN_GREEN_THREADS, service.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert (done.stdout, done.returncode) == ("right\n", 0), done.stderr


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_pool_with_few_connections_is_shared(
    service: Service, open_server: Callable[..., RedisServer], most: int
) -> None:
    """What others need is not kept from them."""
    server = open_server(f"{service.url}?max_connections={most}")

    for n in range(3):
        assert echo(server, f"{n}") == f"{n}"
        assert len(told(server)) == n + 1


def test_closing_leaves_no_connection(
    own_server: Callable[[str], Service], open_server: Callable[..., RedisServer]
) -> None:
    """And a server that was closed can be used again."""
    service = own_server("redis")
    server = open_server(service.url)
    echo(server, "a")
    assert connections(service) == 1

    server.close()

    assert connections(service) == 0
    assert echo(server, "b") == "b"
