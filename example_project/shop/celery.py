"""The shop's Celery app: `celery -A example_project.shop …`."""

from __future__ import annotations

import os

from celery import Celery, signals
from django.conf import settings

from celery_resilience import Resilience
from example_project.shop import pulse, watching

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.shop.settings")

watching.begin()
app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@signals.worker_init.connect(weak=False)
def open_books(**_: object) -> None:
    """Before the pool forks, so that children inherit a live connection."""
    from example_project.shop import labels

    labels.open_book()


if settings.SHOP_IS_RESILIENT:
    Resilience(app)
if settings.SHOP_PULSE:
    pulse.keep(settings.SHOP_PULSE)
