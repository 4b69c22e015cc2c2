"""What celery-resilience costs, against plain Celery in the same run."""
