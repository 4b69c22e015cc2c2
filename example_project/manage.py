#!/usr/bin/env python
"""Django's commands for the shop: `python manage.py failed_tasks list`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    # The shop's modules are `example_project.…`, from whatever folder this is run.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.shop.settings")
    execute_from_command_line(sys.argv)
