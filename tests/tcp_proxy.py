"""A TCP proxy that can be cut, for broken connections to a server that lives."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """
    Forwards a free port to another.

    Args:
        target: The port that it forwards to, on this host.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._sockets: set[socket.socket] = set()
        self._is_refusing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept_all, daemon=True).start()

    def cut(self) -> None:
        """Break every connection; new ones are accepted."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Break every connection, and every new one at once."""
        self._is_refusing = True
        self.cut()

    def accept(self) -> None:
        """Undo `refuse`."""
        self._is_refusing = False

    def close(self) -> None:
        """End it."""
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
                    target=self._forward, args=(source, sink), daemon=True
                ).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for sock in (source, sink):
            self._sockets.discard(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
