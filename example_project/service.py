"""The address service: tells the delivery zone of a city, slowly, and not always.

A process of its own. `GET /zone?city=…&line=…` answers, `POST /state?…` makes
it ill or well, and `GET /health` answers however it feels. It serves at
`SHOP_SERVICE_LISTEN`, such as "0.0.0.0:8080"; without that, at a free port, which it
prints, until its standard input ends.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from example_project import chaos

#: Seconds that an answer takes.
SLOW_S = (0.002, 0.012)

#: Seconds that an answer takes to a line that hangs; longer than any time limit.
HANG_S = 8.0

ZONES = {
    "Berlin": "north",
    "Bremen": "north",
    "Düsseldorf": "west",
    "Graz": "alps",
    "Köln": "west",
    "Leipzig": "east",
    "Lübeck": "north",
    "München": "south",
    "Salzburg": "alps",
    "Zürich": "alps",
}


class AddressService(ThreadingHTTPServer):
    """
    The server and how it feels.

    Args:
        host, port: Where it listens; port 0 is a free one.

    Attributes:
        is_down: It answers everything with 503.
        is_ill: It hangs for some lines, and blinks for others.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.is_down = False
        self.is_ill = True
        self._asked: set[int] = set()

    def change(self, words: Mapping[str, str]) -> None:
        """Go down, come up, or get well."""
        self.is_down = words.get("down", str(int(self.is_down))) == "1"
        self.is_ill = words.get("ill", str(int(self.is_ill))) == "1"

    def zone(self, words: Mapping[str, str]) -> tuple[int, dict[str, str]]:
        """The status and body of an answer, after a while."""
        line_no = int(words["line"])
        time.sleep(random.uniform(*SLOW_S))
        if self.is_down:
            return 503, {"error": "the address service is down"}
        if self.is_ill and chaos.blinks(line_no) and line_no not in self._asked:
            self._asked.add(line_no)
            return 503, {"error": "the address service is busy, ask again"}
        if self.is_ill and line_no in chaos.HANGING:
            time.sleep(HANG_S)
        return 200, {"zone": ZONES.get(words["city"], "abroad")}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: AddressService

    def do_GET(self) -> None:
        """Answer a question."""
        if urlsplit(self.path).path == "/health":
            self._answer(200, {})
            return
        self._answer(*self.server.zone(self._words()))

    def do_POST(self) -> None:
        """Change how the service feels."""
        self.server.change(self._words())
        self._answer(200, {})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _words(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.path).query))

    def _answer(self, status: int, body: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            return  # whoever asked was killed


def main() -> None:
    """Serve at the given address, or until standard input ends."""
    if listen := os.environ.get("SHOP_SERVICE_LISTEN"):
        host, _, port = listen.rpartition(":")
        AddressService(host, int(port)).serve_forever()
    server = AddressService()
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
