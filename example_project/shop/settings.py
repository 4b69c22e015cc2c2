"""Django's settings, and through the namespace CELERY_ those of Celery and ours.

What differs between the two runs, and between the two releases of the shop,
comes from the environment; everything else is the same for all of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from example_project import ledger

SHOP_FOLDER = ledger.FOLDER

#: False: the same shop with plain Celery.
SHOP_IS_RESILIENT = os.environ.get("SHOP_KIND", "resilient") == "resilient"

#: Release 2 reads more kinds of order lines than release 1.
SHOP_RELEASE = int(os.environ.get("SHOP_RELEASE", "1"))

#: PostgreSQL for orders, reports and failed tasks; None: SQLite for each.
SHOP_DATABASE_URL = os.environ.get("SHOP_DATABASE_URL")

#: Of RabbitMQ's queues: "classic" or "quorum".
SHOP_QUEUE_TYPE = os.environ.get("SHOP_QUEUE_TYPE", "classic")

#: A file that tells that a worker or beat is alive; None: nobody asks.
SHOP_PULSE = Path(os.environ["SHOP_PULSE"]) if "SHOP_PULSE" in os.environ else None

SHOP_ORDERS_CSV = Path(__file__).parent.parent / "orders.csv"
SHOP_LEDGER = ledger.PATH
SHOP_SERVICE_URL = os.environ.get("SHOP_SERVICE_URL", "http://127.0.0.1:8080")
SHOP_MISFORTUNES = SHOP_FOLDER / "deaths" if "SHOP_MISFORTUNES" in os.environ else None

# --- Django -------------------------------------------------------------------

SECRET_KEY = "signs nothing: the shop has no pages"
INSTALLED_APPS = ["example_project.shop.apps.ShopConfig", "celery_resilience.django"]
USE_TZ = True

if SHOP_DATABASE_URL:
    _url = urlsplit(SHOP_DATABASE_URL)
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": _url.hostname,
            "PORT": _url.port,
            "USER": _url.username,
            "PASSWORD": _url.password,
            "NAME": _url.path.removeprefix("/"),
        }
    }
    SHOP_REPORTS_URL = _url._replace(scheme="postgresql+psycopg").geturl()
    SHOP_REPORTS_OPTIONS = {}
    CELERY_RESILIENCE_STORE_URL = SHOP_REPORTS_URL
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": SHOP_FOLDER / "shop.sqlite3",
            "CONN_MAX_AGE": None,
            "OPTIONS": {
                "timeout": 20,
                "transaction_mode": "IMMEDIATE",
                # Processes are killed here, and machines are not.
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;",
            },
        }
    }
    CELERY_DB_REUSE_MAX = 1_000  # else Celery closes Django's connection each time
    SHOP_REPORTS_URL = f"sqlite:///{SHOP_FOLDER}/reports.sqlite3"
    SHOP_REPORTS_OPTIONS = {"connect_args": {"timeout": 20}}
    CELERY_RESILIENCE_STORE_URL = f"sqlite:///{SHOP_FOLDER}/failed.sqlite3"

# --- Celery: the same for both runs ---------------------------------------------

CELERY_BROKER_URL = os.environ.get("SHOP_BROKER_URL", "filesystem://localhost")
if CELERY_BROKER_URL.startswith("filesystem"):
    CELERY_BROKER_TRANSPORT = "example_project.shop.broker:Transport"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": f"{SHOP_FOLDER}/queue",
        "data_folder_out": f"{SHOP_FOLDER}/queue",
        "control_folder": f"{SHOP_FOLDER}/exchanges",
        "polling_interval": 0.02,
    }
if CELERY_BROKER_URL.startswith("amqp") and SHOP_QUEUE_TYPE == "quorum":
    CELERY_BROKER_TRANSPORT_OPTIONS = {"confirm_publish": True}
    CELERY_TASK_DEFAULT_QUEUE_TYPE = "quorum"
    CELERY_TASK_DEFAULT_EXCHANGE_TYPE = "topic"
    CELERY_WORKER_DETECT_QUORUM_QUEUES = True
CELERY_TASK_DEFAULT_QUEUE = os.environ.get("SHOP_QUEUE", "shop")
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_WORKER_LOST_WAIT = 0.5
CELERY_WORKER_ENABLE_REMOTE_CONTROL = False
CELERY_TASK_TIME_LIMIT = 60
CELERY_BEAT_SCHEDULE_FILENAME = str(SHOP_FOLDER / "beat-schedule")
CELERY_BEAT_SCHEDULE = {
    "revenue": {
        "task": "example_project.shop.tasks.report_revenue",
        "schedule": float(os.environ.get("SHOP_REPORT_EVERY_S", "60")),
    }
}

# --- celery-resilience; plain Celery does not read these --------------------------

CELERY_RESILIENCE_LOG_FORMAT = os.environ.get("SHOP_LOG_FORMAT")
CELERY_RESILIENCE_FAILED_ARCHIVE_DIR = SHOP_FOLDER / "archive"
CELERY_RESILIENCE_RELEASE = f"shop-{SHOP_RELEASE}"
