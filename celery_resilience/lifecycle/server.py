"""Answers `/live`, `/ready` and others' pages over HTTP, beside the main loop."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

from celery_resilience.errors import ConfigurationError
from celery_resilience.forks import thread_gate
from celery_resilience.lifecycle.health import Answer
from celery_resilience.threads import start_deaf

#: Seconds that a client has to say what it wants.
CLIENT_S = 5.0

Answers = dict[str, Callable[[], Answer]]

#: A page takes what the client accepts, and returns its content type and itself.
Pages = dict[str, Callable[[str], tuple[str, bytes]]]

logger = logging.getLogger("celery_resilience.lifecycle")


class HealthServer:
    """
    Listens from the start on, and answers once it is served.

    Args:
        address: Host, "" for every address of this one, and port.
        answers: What is asked at each path.
        facts: Told beside each answer.
        pages: What others show, by its path.
        setting: By which the address was given.
        others: Addresses that this worker listens on already, by their settings.

    Raises:
        ConfigurationError: The address is taken, or is none of this host.
    """

    def __init__(
        self,
        address: tuple[str, int],
        answers: Answers,
        facts: Callable[[], dict[str, Any]],
        pages: Pages | None = None,
        setting: str = "health_port",
        others: Mapping[str, tuple[str, int]] = MappingProxyType({}),
    ) -> None:
        shown = {"answers": answers, "facts": facts, "pages": pages or {}}
        handler = type("Handler", (_Handler,), shown)
        host, port = address
        try:
            listening = _listen(host, port)
        except OSError as exc:
            said = f"resilience_{setting}: cannot listen on {host or '*'}:{port}: {exc}"
            for other, (its_host, its_port) in others.items():
                if its_port == port and exc.errno == errno.EADDRINUSE:
                    said += (
                        f": resilience_{other} has the port, on {its_host or '*'}; give "
                        "both the same address, and one server answers for both, or "
                        "another port"
                    )
            raise ConfigurationError(said) from exc
        self._server = _Server(("", 0), handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        self._is_served = False

    def serve(self) -> None:
        """Answer from now on."""
        self._is_served = True
        start_deaf(self._server.serve_forever, "health")

    def close(self) -> None:
        """Answer no more."""
        if self._is_served:
            # It waits for the thread, which there must be.
            self._server.shutdown()
        self._server.server_close()

    def close_in_child(self) -> None:
        """Child: let the port go, which else outlives the worker."""
        with contextlib.suppress(OSError):
            self._server.socket.close()


def _listen(host: str, port: int) -> socket.socket:
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
    return socket.create_server(("", port))


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    answers: Answers
    facts: Callable[[], dict[str, Any]]
    pages: Pages

    timeout = CLIENT_S
    server_version = "celery-resilience"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with 200 or 503, and why."""
        path = self.path.partition("?")[0].rstrip("/")
        show = self.pages.get(path)
        if show is not None:
            self._show(show)
            return
        ask = self.answers.get(path)
        if ask is None:
            paths = sorted([*self.answers, *self.pages])
            self._send(HTTPStatus.NOT_FOUND, {"paths": paths})
            return
        with thread_gate.inside():
            answer, facts = ask(), type(self).facts()
        status = HTTPStatus.OK if answer.is_well else HTTPStatus.SERVICE_UNAVAILABLE
        name = path.strip("/")
        body = {name: answer.is_well, "reasons": list(answer.reasons)}
        self._send(status, {**body, **facts})

    do_HEAD = do_GET

    def _show(self, show: Callable[[str], tuple[str, bytes]]) -> None:
        try:
            with thread_gate.inside():
                kind, data = show(", ".join(self.headers.get_all("Accept", ())))
        except Exception:
            logger.exception("cannot show %s", self.path)
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "see the log"})
            return
        self._send_bytes(HTTPStatus.OK, kind, data)

    def _send(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        self._send_bytes(status, "application/json", json.dumps(body).encode() + b"\n")

    def _send_bytes(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """A probe asks every few seconds: nothing is logged."""
