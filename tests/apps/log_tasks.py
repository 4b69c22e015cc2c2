"""Tasks that log, fail and hold secrets; and the log's configuration of several users."""

from __future__ import annotations

import asyncio
import logging
import logging.config
from typing import Any

from celery import signals
from celery.utils.log import get_task_logger
from retrying import SOON_S

from celery_resilience import Skip, Snooze

#: None of these may be in any line.
SECRETS = ("hunter2", "4711-0815", "s3cr3t-pin", "t0p-token")

#: Formatters as their libraries' pages tell to configure them.
FORMATTERS: dict[str, dict[str, Any]] = {
    "json": {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "format": "%(name)s %(levelname)s %(message)s",
    },
    "ecs": {"()": "ecs_logging.StdlibFormatter"},
}


def configure(kind: str, level: str) -> None:
    """Configure the log as a user of that library does."""
    formatter = structlog_formatter() if kind == "structlog" else FORMATTERS[kind]
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"own": formatter},
            "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
            "root": {"handlers": ["own"], "level": level},
        }
    )


def structlog_formatter() -> dict[str, Any]:
    """structlog's formatter for its own events and for those of others."""
    import structlog

    from celery_resilience import add_task_context

    shared = [add_task_context, structlog.stdlib.add_logger_name]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    return {
        "()": "structlog.stdlib.ProcessorFormatter",
        "foreign_pre_chain": [*shared, structlog.stdlib.ExtraAdder()],
        "processors": [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
    }


def register(app: Any, base: Any, kind: str) -> None:
    """
    Register the tasks.

    Args:
        kind: Whose formatter writes the log; "celery": as Celery configures it.
    """
    if kind != "celery":

        def on_setup(loglevel: Any = None, **_: Any) -> None:
            configure(kind, logging.getLevelName(loglevel))

        signals.setup_logging.connect(on_setup, weak=False)

    def task(name: str, **options: Any) -> Any:
        return app.task(base=base, bind=True, shared=False, name=name, **options)

    @task("log_lines")
    def log_lines(self: Any) -> None:
        get_task_logger("shop.tasks").info("of a task's logger")
        logging.getLogger("shop.packing").info("of a library's logger")
        if kind == "structlog":
            import structlog

            structlog.get_logger("shop.structured").info("of structlog's")
        asyncio.run(asyncio.to_thread(logging.getLogger("shop").info, "of a thread"))

    @task("log_pay", redact=["pin"])
    def log_pay(self: Any, card_number: str, order: Any, pin: str = "") -> Any:
        return {"token": SECRETS[3]}

    @task("log_refuse", redact=["pin"])
    def log_refuse(self: Any, pin: str, order: Any) -> None:
        try:
            raise KeyError(order["password"])
        except KeyError as exc:
            raise ValueError(f"cannot take {pin}") from exc

    @task("log_retry", redact=["pin"], max_retries=1)
    def log_retry(self: Any, pin: str) -> None:
        if self.request.retries == 0:
            raise self.retry(exc=ConnectionError(f"{pin} refused"), countdown=SOON_S)

    @task("log_skip")
    def log_skip(self: Any) -> None:
        raise Skip("already paid")

    @task("log_snooze")
    def log_snooze(self: Any) -> None:
        if not (getattr(self.request, "resilience", None) or {}).get("snoozes"):
            raise Snooze(0.1)

    @app.task(name="log_plain", shared=False)
    def log_plain(password: str) -> str:
        logging.getLogger("shop").info("of a plain task")
        return password
