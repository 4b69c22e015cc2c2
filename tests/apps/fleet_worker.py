"""`celery -A fleet_worker`: the app of `fleet`, from the environment."""

from __future__ import annotations

import importlib
import json
import os

from fleet import make_app

conf = json.loads(os.environ["FLEET_CONF"])
if "fleet_sentry" in conf or "fleet_spans" in conf:
    importlib.import_module("traced").set_up(conf)

app = make_app(
    conf,
    is_plain=os.environ.get("FLEET_PLAIN") == "1",
)

#: A module of the test's that changes the app, to break it at one point.
if os.environ.get("FLEET_SABOTAGE"):
    importlib.import_module(os.environ["FLEET_SABOTAGE"]).sabotage(app)
