"""Publish to the app's broker so that returning means stored.

One connection, opened when first needed, apart from the consumer's: confirmed
and mandatory on AMQP, and with a time limit on every wait. A channel that saw
an error is thrown away, because the confirm of the failed publish could be
taken for the next one's (``amqp/channel.py:1814``, amqp 5.4). What may have been
stored is not sent again here: only the caller knows whether a second one does harm.
"""

from __future__ import annotations

import contextlib
import logging
from threading import Lock
from typing import Any

from kombu import Connection, Producer, Queue

from celery_resilience._kombu import is_closed, lost_connection_errors, queue_arguments
from celery_resilience._kombu_redis import put_once, reuse_client
from celery_resilience.errors import BrokerUnavailable, NoRoute, PublishRefused
from celery_resilience.forks import thread_gate
from celery_resilience.message import TRANSPORT_PROPERTIES, OriginalMessage

logger = logging.getLogger("celery_resilience.publisher")

#: Seconds that one publish may take before the broker counts as away.
TIMEOUT_S = 5.0


class Publisher:
    """
    Publishes messages to queues of the app's broker, from any thread.

    Args:
        app: The Celery app.
        timeout_s: Seconds that connecting and publishing may each take.
    """

    def __init__(self, app: Any, timeout_s: float = TIMEOUT_S) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._lock = Lock()
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._declared: set[str] = set()

    def publish(self, message: OriginalMessage, *, declare: bool = False) -> None:
        """
        Store *message* in its queue, at the broker's word.

        Args:
            message: Goes to `message.queue` by the default exchange.
            declare: Make the queue first, durable and without a delivery limit.

        Raises:
            NoRoute: The broker has no such queue (AMQP only).
            PublishRefused: The broker answered and did not take it, because the
                queue is full or the message too large.
            BrokerUnavailable: No answer; the message may or may not be there.
        """
        # A pool without an event loop forks in another thread than that of the results.
        with thread_gate.inside(), self._lock:
            if self._connection is not None and is_closed(self._connection):
                self._drop()  # it has died of idleness
            self._publish_once(message, declare)

    def close(self) -> None:
        """Close the connection; the next publish opens another."""
        with self._lock:
            self._drop()

    def _publish_once(self, message: OriginalMessage, declare: bool) -> None:
        try:
            self._publish(message, declare)
        except Exception as exc:
            connection = self._connection or self._app.connection_for_write()
            said = f"{connection.as_uri()}: {type(exc).__name__}: {exc}"
            is_away = isinstance(exc, lost_connection_errors(connection))
            self._drop()
            if "NO_ROUTE" in str(exc):
                raise NoRoute(
                    f"NO_ROUTE: there is no queue named {message.queue!r}"
                ) from exc
            raise (BrokerUnavailable if is_away else PublishRefused)(said) from exc

    def _publish(self, message: OriginalMessage, declare: bool) -> None:
        producer = self._producer or self._connect()
        if declare and message.queue not in self._declared:
            self._declare(message.queue)
            self._declared.add(message.queue)
            producer = self._producer or self._connect()
        headers = dict(message.headers)
        properties = {
            name: value
            for name, value in message.properties.items()
            if name not in TRANSPORT_PROPERTIES
        }
        expiration = properties.pop("expiration", None)
        priority = properties.pop("priority", None)
        producer.publish(
            message.body,
            exchange="",
            routing_key=message.queue,
            headers=headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            # The body was decompressed as it arrived (kombu/message.py:79).
            compression=headers.pop("compression", None),
            priority=0 if priority is None else priority,
            delivery_mode=properties.pop("delivery_mode", 2),
            expiration=None if expiration is None else float(expiration) / 1000,
            mandatory=True,
            timeout=self._timeout_s,
            confirm_timeout=self._timeout_s,
            **properties,
        )

    def _connect(self) -> Producer:
        options: dict[str, Any] = {
            "confirm_publish": True,
            "socket_timeout": self._timeout_s,
            "socket_connect_timeout": self._timeout_s,
            "retry_on_timeout": False,
            "read_timeout": self._timeout_s,
            "write_timeout": self._timeout_s,
        }
        connection = self._app.connection_for_write(
            heartbeat=0,
            connect_timeout=self._timeout_s,
            transport_options=_accepted_options(self._app, options),
        )
        try:
            connection.connect()
            channel = connection.channel()
            reuse_client(channel)
            put_once(channel)
            self._producer = Producer(channel, auto_declare=False)
        except BaseException:
            connection.release()
            raise
        self._connection = connection
        return self._producer

    def _declare(self, name: str) -> None:
        """Make a queue unless it is there, whatever arguments it was made with."""
        assert self._connection is not None
        queue = Queue(
            name,
            durable=True,
            queue_arguments=queue_arguments(self._app, self._connection),
        )
        channel: Any = self._connection.channel()
        try:
            queue.bind(channel).queue_declare(passive=True)
            channel.close()
        except self._connection.channel_errors:
            with self._connection.channel() as another:
                queue.bind(another).queue_declare()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._producer = None
        self._declared.clear()
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect(socket_timeout=0.1)


def _accepted_options(app: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the app's transport knows; SQLAlchemy refuses others."""
    driver = app.connection_for_write().transport.driver_type
    names = {
        "redis": {"socket_timeout", "socket_connect_timeout", "retry_on_timeout"},
        "amqp": {"confirm_publish", "read_timeout", "write_timeout"},
    }.get(driver, set())
    return {name: value for name, value in options.items() if name in names}
