"""The client for Redis, and the scripts that rooms run on it.

All keys of an app share one hash tag, so that they are in one slot of a cluster
and one script may use them all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from threading import Lock
from typing import Any

from celery_resilience.errors import MissingExtra, SchemaMismatch, StoreUnavailable
from celery_resilience.redaction import without_password
from celery_resilience.stores.redis_scripts import RedisScripts, script_of

logger = logging.getLogger("celery_resilience.stores")

CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 30

#: Idle for longer, a connection is tried before it is used.
HEALTH_CHECK_S = 30


class RedisServer:
    """
    One server or cluster, used from any process: each opens its own connections.

    Args:
        url: `redis://`, `rediss://`, `redis+socket://` as kombu has it, or
            `redis+cluster://`.
        namespace: The app's; several share a server.
        tls: Keywords of redis-py's connection, such as `ssl_ca_certs`.
        connect_s: Seconds that making a connection may take.
        answer_s: Seconds that an answer may take.
        health_check_s: A connection that was idle for so many seconds is tried before
            it is used; 0: never, which saves a round trip.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        tls: Mapping[str, Any] | None = None,
        connect_s: float = CONNECT_TIMEOUT_S,
        answer_s: float = ANSWER_TIMEOUT_S,
        health_check_s: float = HEALTH_CHECK_S,
    ) -> None:
        self._url = url
        self._options: dict[str, Any] = {
            "socket_connect_timeout": connect_s,
            "socket_timeout": answer_s,
            "health_check_interval": health_check_s,
            **(tls or {}),
        }
        self._is_cluster = url.startswith("redis+cluster:")
        self._tag = f"{{celery-resilience:{namespace}}}"
        self._client: Any = None
        #: What a client raises that has no answer; redis-py's too, once it is there.
        self._errors: tuple[type[Exception], ...] = (OSError,)
        #: None in a cluster, where redis-py finds the node.
        self._runner: RedisScripts | None = None
        self._scripts: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {}
        self._ready: set[str] = set()
        self._pid = os.getpid()
        self._lock = Lock()

    def ready(self, room: str, version: int) -> None:
        """
        Make sure that the keys of *room* are of *version*.

        Raises:
            SchemaMismatch: They are of another version.
            StoreUnavailable: Redis did not answer.
        """
        self._own_process()
        if room in self._ready:
            return
        with self.client() as client:
            client.set(self._schema_key(room), version, nx=True)
            found = int(client.get(self._schema_key(room)))
            self._warn_of_eviction(client)
        if found != version:
            raise SchemaMismatch(
                f"the keys of {room!r} in {self._shown()} are of version {found}, this "
                f"release of celery-resilience knows version {version}: "
                + ("upgrade celery-resilience here" if found > version else "upgrade")
            )
        self._ready.add(room)

    def write(self, room: str, version: int) -> None:
        """
        Write what is there already.

        Raises:
            StoreUnavailable: Redis takes nothing: it is away, full or a replica.
        """
        with self.client() as client:
            client.set(self._schema_key(room), version, xx=True)

    def _schema_key(self, room: str) -> str:
        return f"{self._tag}:schema:{room}"

    def prefix(self, room: str) -> str:
        """How the keys of *room* begin."""
        return f"{self._tag}:{room}:"

    def run(self, room: str, script: str, *words: Any) -> Any:
        """
        Run a script of a room.

        Args:
            room: The package whose folder `lua` has the script.
            script: Its name without the ending.
            words: Its arguments; the prefix of the room's keys is its only key.
        """
        client = self._open()
        try:
            found = self._scripts.get((room, script))
            if found is None:
                found = self._script(client, room, script)
                self._scripts[room, script] = found
            return found(words)
        except self._errors as exc:
            raise self._unavailable(exc) from exc

    def _script(
        self, client: Any, room: str, script: str
    ) -> Callable[[tuple[Any, ...]], Any]:
        """What runs a script with its arguments."""
        source, prefix = _source(room, script), self.prefix(room)
        if self._runner is not None:
            return partial(self._runner.run, script_of(source, prefix))
        registered = client.register_script(source)
        return lambda words: registered(keys=[prefix], args=words)

    def read(self, keys: Sequence[str], names: Sequence[str]) -> list[list[Any]]:
        """The fields *names* of the hashes *keys*, in one round trip."""
        if not keys:
            return []
        with self.client() as client, client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hmget(key, names)
            found: list[list[Any]] = pipe.execute()
            return found

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """
        This process's client.

        Raises:
            StoreUnavailable: Redis did not answer, or refused.
        """
        client = self._open()
        try:
            yield client
        except self._errors as exc:
            raise self._unavailable(exc) from exc

    def close(self) -> None:
        """Close this process's connections."""
        if self._client is not None and self._pid == os.getpid():
            if self._runner is not None:
                self._runner.close()
            if self._is_cluster:
                # Its close() leaves the pools of its nodes open (redis-py 8.1).
                self._client.disconnect_connection_pools()
            self._client.close()
            self._client = self._runner = None
            self._scripts = {}

    def _own_process(self) -> None:
        """A forked child never uses its parent's connections."""
        if self._pid != os.getpid():
            # The parent's lock may have been held as it forked.
            self._lock = Lock()
            self._client = self._runner = None
            self._scripts = {}
            self._ready = set()
            self._pid = os.getpid()

    def load(self) -> None:
        """
        Make the client, which connects when it is used.

        Raises:
            MissingExtra: redis-py is not installed.
        """
        if not self._is_cluster:  # that one asks at once
            self._open()

    def _open(self) -> Any:
        self._own_process()
        if self._client is None:
            with self._lock:
                if self._client is None:
                    client = self._make_client()
                    if not self._is_cluster:
                        self._runner = RedisScripts(client.connection_pool)
                    self._client = client
        return self._client

    def _make_client(self) -> Any:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as exc:
            raise MissingExtra.of("redis", "redis", self._shown()) from exc
        self._errors = (redis.RedisError, OSError)
        options = dict(self._options)
        kind, _, rest = self._url.partition("://")
        # As Celery spells it; redis-py knows "required".
        rest = re.sub(r"(?<=ssl_cert_reqs=)CERT_\w+", lambda m: m[0][5:].lower(), rest)
        try:
            if self._is_cluster:
                return redis.RedisCluster.from_url(f"redis://{rest}", **options)
            # A command whose answer was lost may have been done: it is not repeated.
            options["retry"] = Retry(NoBackoff(), 0)
            if kind == "redis+socket":
                path = rest.replace("virtual_host=", "db=")
                return redis.Redis.from_url(f"unix://{path}", **options)
            return redis.Redis.from_url(f"{kind}://{rest}", **options)
        except self._errors as exc:
            raise self._unavailable(exc) from exc

    def _unavailable(self, exc: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"{self._shown()}: {exc}")

    def weaknesses(self) -> list[str]:
        """
        How this Redis may forget what it holds, a sentence each.

        Raises:
            StoreUnavailable: Redis did not answer.
        """
        with self.client() as client:
            eviction = self._eviction(client, ("allkeys", "volatile"))
            found = [eviction] if eviction else []
            if self._is_in_memory_only(client):
                found.append(
                    f"{self._shown()} keeps nothing on disk, and forgets all when it "
                    "restarts: set appendonly yes"
                )
        return found

    def _warn_of_eviction(self, client: Any) -> None:
        # Failed tasks do not expire: policies for what does leave them alone.
        eviction = self._eviction(client, ("allkeys",))
        if eviction:
            logger.warning(eviction)

    def _eviction(self, client: Any, kinds: tuple[str, ...]) -> str | None:
        from redis.exceptions import RedisError

        try:
            memory = client.info("memory")
        except RedisError:
            return None  # not allowed to ask
        policy = str(memory.get("maxmemory_policy", ""))
        if not memory.get("maxmemory") or not policy.startswith(kinds):
            return None
        return (
            f"{self._shown()} evicts keys when its memory is full (maxmemory-policy "
            f"{policy}), and failed tasks and idempotency keys with them: set "
            "maxmemory-policy to noeviction"
        )

    def _is_in_memory_only(self, client: Any) -> bool:
        from redis.exceptions import RedisError

        try:
            if client.info("persistence").get("aof_enabled"):
                return False
            return not client.config_get("save").get("save")
        except RedisError:
            return False  # not allowed to ask

    def _shown(self) -> str:
        return without_password(self._url)


def _source(room: str, script: str) -> str:
    folder = files(f"celery_resilience.{room}") / "lua"
    common = folder / "common.lua"
    begin = common.read_text() if common.is_file() else ""
    return begin + (folder / f"{script}.lua").read_text()
