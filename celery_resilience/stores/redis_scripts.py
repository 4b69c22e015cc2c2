"""Scripts, sent to one Redis over connections that are kept for them.

redis-py's client takes a connection out of its pool for each command, tries it, and
measures and repeats around it, which takes about as long as the script's own round trip.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import deque
from typing import Any, NamedTuple

#: So many connections, that nobody uses just now, stay out of redis-py's pool.
KEPT = 8

#: Words of a call before its arguments: EVALSHA, the digest, the number of keys, a key.
_FIXED = 4


class Script(NamedTuple):
    """
    A script of Redis's, with one key.

    Attributes:
        source: Its text.
        head: How each call of it begins on the wire, after the number of its words.
    """

    source: str
    head: bytes


def script_of(source: str, key: str) -> Script:
    """The script *source*, whose only key is *key*."""
    digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return Script(source, b"".join(_parts(("EVALSHA", digest, 1, key))))


class RedisScripts:
    """
    Sends scripts, each over a connection that nobody else uses meanwhile.

    A forked child makes another of these: it drops its parent's connections, which
    closes its own copies of them and says nothing on them.

    Args:
        pool: redis-py's, of the server.

    Source: redis-py 4.5.2 to 8.1, ``connection.py``: of a connection `can_read`,
    `send_packed_command` and `read_response`; of a pool `get_connection`, which asks for
    a name before 5.3 and warns of one after, and `release`.
    """

    def __init__(self, pool: Any) -> None:
        from redis.exceptions import NoScriptError, RedisError, ResponseError

        self._pool = pool
        self._idle: deque[Any] = deque()
        # Others need connections too, and a pool may have few.
        self._kept = min(KEPT, pool.max_connections // 4)
        name = inspect.signature(pool.get_connection).parameters["command_name"]
        self._name = ("EVALSHA",) if name.default is name.empty else ()
        self._lost: tuple[type[Exception], ...] = (RedisError, OSError)
        self._refused = ResponseError
        self._unknown = NoScriptError

    def run(self, script: Script, words: tuple[Any, ...]) -> Any:
        """
        What *script* answers to *words*.

        It is not sent again where its answer is lost: it may have been done.

        Raises:
            redis.RedisError, OSError: Redis did not answer, or refused.
        """
        idle = self._idle
        try:
            connection, was_idle = idle.pop(), True
        except IndexError:
            connection, was_idle = self._pool.get_connection(*self._name), False
        is_read = False
        try:
            if was_idle and not self._is_usable(connection):
                connection.disconnect()
                connection.connect()
            try:
                answer = self._answer(connection, script, words)
            except self._refused:
                is_read = True
                raise
            is_read = True
            return answer
        finally:
            if is_read and len(idle) < self._kept:
                idle.append(connection)
            else:
                if not is_read:
                    # Whatever it was: the answer would be taken for the next call's.
                    connection.disconnect()
                self._pool.release(connection)

    def close(self) -> None:
        """Close the idle connections, and give them back to the pool."""
        while self._idle:
            connection = self._idle.pop()
            connection.disconnect()
            self._pool.release(connection)

    def _is_usable(self, connection: Any) -> bool:
        """Whether the server still holds a connection, and has said nothing on it."""
        try:
            return not connection.can_read(0)
        except self._lost:
            return False

    def _answer(self, connection: Any, script: Script, words: tuple[Any, ...]) -> Any:
        call = [
            b"".join((b"*%d\r\n" % (_FIXED + len(words)), script.head, *_parts(words)))
        ]
        connection.send_packed_command(call)
        try:
            return connection.read_response()
        except self._unknown:
            # Redis forgets scripts as it restarts; it has done nothing.
            connection.send_command("SCRIPT", "LOAD", script.source)
            connection.read_response()
            connection.send_packed_command(call)
            return connection.read_response()


def _parts(words: tuple[Any, ...]) -> list[bytes]:
    """
    Words as Redis reads them, in parts.

    Source: "Redis serialization protocol specification", bulk strings; numbers as
    redis-py writes them.
    """
    parts: list[bytes] = []
    for word in words:
        if isinstance(word, str):
            data = word.encode()
        elif isinstance(word, bytes):
            data = word
        elif isinstance(word, int | float) and not isinstance(word, bool):
            data = repr(word).encode()
        else:
            raise TypeError(f"Redis takes no {type(word).__qualname__}")
        parts += (b"$%d\r\n" % len(data), data, b"\r\n")
    return parts
