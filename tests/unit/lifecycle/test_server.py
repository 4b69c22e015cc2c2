"""The answers over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from services import free_port

from celery_resilience.errors import ConfigurationError
from celery_resilience.lifecycle.health import Answer
from celery_resilience.lifecycle.server import HealthServer

ANSWERS = {"/live": lambda: Answer(), "/ready": lambda: Answer(("it drains",))}


@pytest.fixture(params=["127.0.0.1", "", "localhost"])
def port(request: Any) -> Iterator[int]:
    """Of a server that listens on a host, or on every address."""
    port = free_port()
    server = HealthServer((request.param, port), ANSWERS, lambda: {"running": 3})
    server.serve()
    yield port
    server.close()


def ask(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read()


def test_the_status_is_for_a_probe_and_the_body_for_a_person(port: int) -> None:
    """200 and 503; a path with a slash or a question is the same."""
    assert ask(port, "/live/?x=1") == ask(port, "/live")
    status, body = ask(port, "/live")
    assert status == 200
    assert json.loads(body) == {"live": True, "reasons": [], "running": 3}
    status, body = ask(port, "/ready")
    assert status == 503
    assert json.loads(body)["reasons"] == ["it drains"]


def test_head_and_unknown_paths(port: int) -> None:
    """HEAD has no body; what there is is told."""
    assert ask(port, "/ready", "HEAD") == (503, b"")
    status, body = ask(port, "/")
    assert (status, json.loads(body)) == (404, {"paths": ["/live", "/ready"]})
    assert ask(port, "/live", "POST")[0] == 501


def test_a_client_that_says_nothing_holds_up_nobody(port: int) -> None:
    """Each has a thread of its own."""
    with socket.create_connection(("127.0.0.1", port)):
        assert ask(port, "/live")[0] == 200


def test_a_taken_port_is_refused() -> None:
    """With the setting's name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()[:2]
        with pytest.raises(ConfigurationError, match="resilience_health_port: cannot"):
            HealthServer(address, ANSWERS, dict)


def test_a_child_does_not_keep_the_port() -> None:
    """A worker that ends leaves it to the next, though a child lives on."""
    port = free_port()
    server = HealthServer(("127.0.0.1", port), ANSWERS, dict)
    server.serve()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        server.close_in_child()
        os.read(reader, 1)
        os._exit(0)
    try:
        server.close()
        with socket.create_server(("127.0.0.1", port)) as next_one:
            assert next_one.getsockname()[1] == port
    finally:
        os.write(writer, b"x")
        os.waitpid(pid, 0)


def test_a_server_that_never_answered_is_closed() -> None:
    """A worker that is stopped while it starts must not wait for a thread."""
    port = free_port()
    HealthServer(("127.0.0.1", port), ANSWERS, dict).close()

    with socket.create_server(("127.0.0.1", port)) as next_one:
        assert next_one.getsockname()[1] == port


# --- others' pages ---------------------------------------------------------------------


def test_a_page_is_shown_beside_the_answers() -> None:
    """With its own type, in the form that the client accepts."""
    port = free_port()
    pages = {"/metrics": lambda accept: (f"text/{accept}", b"x 1\n")}
    server = HealthServer(("127.0.0.1", port), ANSWERS, dict, pages)
    server.serve()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/metrics", headers={"Accept": "odd"})
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "text/odd"
        assert response.read() == b"x 1\n"
        assert ask(port, "/live")[0] == 200
        assert json.loads(ask(port, "/")[1]) == {
            "paths": ["/live", "/metrics", "/ready"]
        }
    finally:
        server.close()


def test_a_page_that_fails_is_an_error_and_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client is told, the log has the reason, and the next one is answered."""
    port = free_port()

    def fail(accept: str) -> tuple[str, bytes]:
        raise RuntimeError("nothing to show")

    server = HealthServer(("127.0.0.1", port), {}, dict, {"/metrics": fail})
    server.serve()
    try:
        assert [ask(port, "/metrics")[0] for _ in range(2)] == [500, 500]
    finally:
        server.close()
    assert "nothing to show" in caplog.text


def test_a_taken_port_is_refused_by_its_own_name() -> None:
    """Not by that of the health port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()[:2]
        with pytest.raises(ConfigurationError, match="resilience_metrics_port: cannot"):
            HealthServer(address, {}, dict, {}, "metrics_port")
