"""The shop: orders, payments and shipments in Django, its reports in SQLAlchemy."""

from example_project.shop.celery import app as celery_app

__all__ = ("celery_app",)
