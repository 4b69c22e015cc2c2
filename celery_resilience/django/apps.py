"""What INSTALLED_APPS finds under "celery_resilience.django"."""

from __future__ import annotations

from django.apps import AppConfig


class CeleryResilienceConfig(AppConfig):
    """Brings `manage.py failed_tasks` and the table of `once`; it turns nothing on."""

    name = "celery_resilience.django"
    label = "celery_resilience"
    verbose_name = "Celery resilience"
