"""A TCP proxy that can be cut, for broken connections to a server that lives."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import make_url


class Proxy:
    """
    Forwards a free port to another.

    Args:
        target: The port that it forwards to, on this host.

    Attributes:
        turns: How often a client has said something and waited for the answer.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._sockets: set[socket.socket] = set()
        self._is_refusing = False
        self._last_words = b""
        self._needle = b""
        self._unanswered: set[socket.socket] = set()
        self._latency_s = 0.0
        self._closed = threading.Event()
        self.turns = 0
        self._last_speaker: dict[frozenset[socket.socket], socket.socket] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept_all, daemon=True).start()

    def cut(self) -> None:
        """Break every connection; new ones are accepted."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def refuse_at(self, words: bytes) -> None:
        """Break every connection when *words* come by, as `refuse` does."""
        self._last_words = words

    def refuse(self) -> None:
        """Break every connection, and every new one at once."""
        self._is_refusing = True
        self.cut()

    def accept(self) -> None:
        """Undo `refuse`."""
        self._is_refusing = False

    def cut_answer_to(self, needle: bytes) -> None:
        """Forward the next data that holds *needle*, and cut in place of the answer."""
        self._needle = needle

    def slow_down(self, latency_s: float) -> None:
        """Let whatever a client says take so long to arrive."""
        self._latency_s = latency_s

    @property
    def has_cut_answer(self) -> bool:
        """Whether what was asked for by `cut_answer_to` has happened."""
        return not self._needle

    def close(self) -> None:
        """End it."""
        self._closed.set()
        self._listener.close()
        self.cut()

    def _accept_all(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._sockets |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(
                    target=self._forward,
                    args=(source, sink, source is client),
                    daemon=True,
                ).start()

    def _forward(
        self, source: socket.socket, sink: socket.socket, is_client: bool
    ) -> None:
        pair = frozenset((source, sink))
        with contextlib.suppress(OSError):
            seen = b""
            while data := source.recv(65_536):
                if self._last_words and self._last_words in data:
                    self._last_words = b""
                    self.refuse()
                    break
                if source in self._unanswered:
                    break
                if is_client and self._last_speaker.get(pair) is not source:
                    self.turns += 1
                self._last_speaker[pair] = source
                seen = (seen + data)[-65_536:]
                if is_client and self._latency_s:
                    self._closed.wait(self._latency_s)
                if self._needle and self._needle in seen:
                    self._needle = b""
                    self._unanswered.add(sink)
                sink.sendall(data)
        for sock in (source, sink):
            self._sockets.discard(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@contextlib.contextmanager
def proxy_to(server: Any) -> Iterator[Proxy]:
    """A proxy to a server of the tests, for the length of a block."""
    proxy = Proxy(server.port)
    try:
        yield proxy
    finally:
        proxy.close()


def url_through(proxy: Proxy, url: str) -> str:
    """The URL of the same server through its proxy."""
    there = make_url(url).set(host="127.0.0.1", port=proxy.port)
    return there.render_as_string(hide_password=False)
