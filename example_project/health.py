"""Health checks of the shop's containers: `python -m example_project.health …`.

They import neither Django nor Celery, for they run every few seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from urllib.request import urlopen

TIMEOUT_S = 3.0


def pulse_age_s(path: Path) -> float:
    """
    Seconds since a process gave a sign of life; see `shop/pulse.py`.

    Raises:
        OSError: It has given none yet.
    """
    return time.time() - path.stat().st_mtime


def ask(service_url: str) -> None:
    """
    Ask the address service whether it is there.

    Raises:
        OSError: It is not.
    """
    urlopen(f"{service_url}/health", timeout=TIMEOUT_S).close()


def main() -> int:
    """Check one thing; returns 0 where it is well, and says what is not."""
    parser = argparse.ArgumentParser(prog="python -m example_project.health")
    checks = parser.add_subparsers(dest="check", required=True)
    pulse = checks.add_parser("pulse", help="the file $SHOP_PULSE is young")
    pulse.add_argument("max_age_s", type=float)
    checks.add_parser("service", help="$SHOP_SERVICE_URL answers")
    words = parser.parse_args()
    try:
        if words.check == "service":
            ask(os.environ["SHOP_SERVICE_URL"])
            return 0
        age_s = pulse_age_s(Path(os.environ["SHOP_PULSE"]))
    except OSError as exc:
        print(exc, file=sys.stderr)
        return 1
    if age_s > words.max_age_s:
        print(f"the last sign of life was {age_s:.0f} s ago", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
