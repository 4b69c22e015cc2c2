"""`make demo`: the same bad day at the shop with plain Celery, and then resilient."""
