"""The shop as a Django app."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """Gives the app its name."""

    name = "example_project.shop"
    label = "shop"
    default_auto_field = "django.db.models.BigAutoField"
