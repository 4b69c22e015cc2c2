"""What the verbs of `celery -A shop failed` do; their words are in `command.py`."""
