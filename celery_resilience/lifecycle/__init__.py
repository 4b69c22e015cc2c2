"""The room of a worker's life: stop conditions, one drain, health, exit code.

One deadline runs from the first signal to the last byte. `policy.py` decides,
`drain.py` keeps the time, `health.py` and `server.py` tell the truth to probes, and
`bootstep.py` and `signals.py` meet Celery.
"""
