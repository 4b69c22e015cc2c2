"""One small shop that has the same bad day twice: with plain Celery, then resilient."""
