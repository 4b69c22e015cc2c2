"""
`celery -A fleet_worker`: the app of `fleet`, from the environment.

The setting `fleet_constants` has values that take the place of the package's own in this
process and its children, by their full names.
"""

from __future__ import annotations

import importlib
import json
import os

from fleet import make_app

conf = json.loads(os.environ["FLEET_CONF"])

for name, value in conf.get("fleet_constants", {}).items():
    module, _, constant = name.rpartition(".")
    assert hasattr(importlib.import_module(module), constant), name
    setattr(importlib.import_module(module), constant, value)

if "fleet_sentry" in conf or "fleet_spans" in conf:
    importlib.import_module("traced").set_up(conf)

app = make_app(conf, is_plain=os.environ.get("FLEET_PLAIN") == "1")

#: A module of the test's that changes the app, to break it at one point.
if os.environ.get("FLEET_SABOTAGE"):
    importlib.import_module(os.environ["FLEET_SABOTAGE"]).sabotage(app)
