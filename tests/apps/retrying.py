"""When a task of the tests is tried again."""

from __future__ import annotations

#: Seconds. Celery sends the next run before it stores RETRY: one that has ended by then
#: stays so, to whoever waits for its result.
SOON_S = 0.2
