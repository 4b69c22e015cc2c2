"""What `manage.py` can do with failed tasks."""
