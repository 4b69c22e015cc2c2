"""celery-resilience in a Django project: an app for INSTALLED_APPS."""
