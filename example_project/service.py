"""The world outside the shop, in a process of its own: an address service and a bank.

The address service tells the delivery zone of a city, slowly, and not always:
`GET /zone?city=…&line=…` answers, `POST /state?…` makes it ill or well.

The bank is always well. `POST /charge?order=…&cents=…&key=…` takes money, once for each
key; without a key, each time that it is asked.

`GET /health` answers however they feel. They serve at `SHOP_SERVICE_LISTEN`, such as
"0.0.0.0:8080"; without that, at a free port, which is printed, until standard input ends.
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
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from example_project import chaos, ledger
from example_project.ledger import Effect

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


class Bank:
    """
    Takes money, and writes it into the ledger in the moment in which it is taken.

    Whoever asked may be killed before it hears the answer: the line is there.

    Args:
        path: The ledger. The keys in it were seen by this bank before it was restarted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._keys = {entry.key for entry in ledger.Reader(path).new_entries()}

    def charge(self, words: Mapping[str, str]) -> dict[str, int]:
        """The body of an answer: what was taken now, which is nothing for a known key."""
        order, cents, key = int(words["order"]), int(words["cents"]), words.get("key")
        with self._lock:
            if key is not None and key in self._keys:
                return {"taken_cents": 0}
            ledger.append(self._path, Effect.CHARGED, order, cents, key=key)
            self._keys.add(key)
        return {"taken_cents": cents}


class OutsideWorld(ThreadingHTTPServer):
    """
    The server, the bank behind it, and how the address service feels.

    Args:
        host, port: Where it listens; port 0 is a free one.

    Attributes:
        bank: Never down.
        is_down: Every question for a zone is answered with 503.
        is_ill: Some lines hang, and others blink.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.bank = Bank(ledger.PATH)
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

    server: OutsideWorld

    def do_GET(self) -> None:
        """Answer a question."""
        if urlsplit(self.path).path == "/health":
            self._answer(200, {})
            return
        self._answer(*self.server.zone(self._words()))

    def do_POST(self) -> None:
        """Take money, or change how the address service feels."""
        if urlsplit(self.path).path == "/charge":
            self._answer(200, self.server.bank.charge(self._words()))
            return
        self.server.change(self._words())
        self._answer(200, {})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _words(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.path).query))

    def _answer(self, status: int, body: Mapping[str, str | int]) -> None:
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
        OutsideWorld(host, int(port)).serve_forever()
    server = OutsideWorld()
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
