"""The `resilience_*` settings, and the store that follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.errors import ConfigurationError
from celery_resilience.redaction import without_password
from celery_resilience.settings import (
    NOT_IN_THIS_RELEASE,
    STORES,
    Settings,
    choose_store,
    default_namespace,
    read_settings,
)

GOOD: list[tuple[str, Any, Any]] = [
    ("enabled", True, True),
    ("enabled", False, False),
    ("namespace", "shop.eu-1:a_b", "shop.eu-1:a_b"),
    ("namespace", "n" * 64, "n" * 64),
    ("store_url", None, None),
    ("store_url", "sqlite:////tmp/x.sqlite3", "sqlite:////tmp/x.sqlite3"),
    ("store_url", "rediss://:p@h:6380/1", "rediss://:p@h:6380/1"),
    ("store_url", "redis+socket:///run/r.sock", "redis+socket:///run/r.sock"),
    ("store_url", "postgresql://h/db", "postgresql://h/db"),
    ("store_url", "postgresql+psycopg://h/db", "postgresql+psycopg://h/db"),
    ("store_url", "mysql://h/db", "mysql://h/db"),
    ("store_url", "mysql+pymysql://h/db", "mysql+pymysql://h/db"),
    ("store_url", "mariadb+pymysql://h/db", "mariadb+pymysql://h/db"),
    ("create_schema", False, False),
    ("failed_queue", "the failed", "the failed"),
    ("failed_routes", {}, ()),
    ("failed_routes", {"a.*": "q", "B": None}, (("a.*", "q"), ("B", None))),
    ("failed_keep_days", None, None),
    ("failed_keep_days", 0.5, 0.5),
    ("failed_max", None, None),
    ("failed_max", 1, 1),
    ("failed_max_mib", None, None),
    ("failed_max_mib", 64, 64.0),
    ("failed_archive_dir", None, None),
    ("failed_archive_dir", "/var/archive", Path("/var/archive")),
    ("collect_failed", True, True),
    ("collect_queues", ["dead", "dead", "late"], ("dead", "late")),
    ("collect_queues", (), ()),
    ("spool_dir", None, None),
    ("spool_dir", "/var/spool/shop", Path("/var/spool/shop")),
    ("spool_dir", Path("/var/spool/shop"), Path("/var/spool/shop")),
    ("redact", ["card"], ("card",)),
    ("redact", (), ()),
    ("redact", {"card"}, ("card",)),
    ("max_crashes", 1, 1),
    ("max_crashes", 50, 50),
    ("if_store_down", "wait", "wait"),
    ("if_store_down", "run", "run"),
    ("sessions", "auto", "auto"),
    ("sessions", "strict", "strict"),
    ("sessions", "off", "off"),
    ("circuits", {}, ()),
    ("circuits", {"bank": {}}, (("bank", {}),)),
    ("circuits", {"b": {"open_s": 1}}, (("b", {"open_s": 1}),)),
    ("retry_budgets", {"b": {"share": 1}}, (("b", {"share": 1}),)),
    ("crash_window_s", 0.5, 0.5),
    ("crash_window_s", 60, 60.0),
    ("drain_timeout_s", None, None),
    ("drain_timeout_s", 30, 30.0),
    ("health_port", None, None),
    ("health_port", 8081, ("", 8081)),
    ("health_port", "8081", ("", 8081)),
    ("health_port", "127.0.0.1:8081", ("127.0.0.1", 8081)),
    ("health_port", "localhost:1", ("localhost", 1)),
    ("health_port", "[::1]:65535", ("::1", 65535)),
    ("metrics_port", None, None),
    ("metrics_port", "127.0.0.1:9540", ("127.0.0.1", 9540)),
    ("memory_recycle_mib", None, None),
    ("memory_recycle_mib", 300, 300.0),
    ("memory_recycle_mib", 0.5 + 1, 1.5),
    ("memory_recycle_mib", "25%", "25%"),
    ("memory_limit_mib", None, None),
    ("memory_limit_mib", 1, 1.0),
    ("memory_limit_mib", "12.5%", "12.5%"),
    ("memory_limit_mib", "100%", "100%"),
    ("log_format", None, None),
    ("log_format", "json", "json"),
    ("log_format", "logfmt", "logfmt"),
    ("release", None, None),
    ("release", "v1.2", "v1.2"),
]  # fmt: skip

BAD: list[tuple[str, Any, str]] = [
    ("enabled", 1, "True or False"),
    ("enabled", None, "True or False"),
    ("enabled", "false", "True or False"),
    ("namespace", "", "1 to 64 letters"),
    ("namespace", "n" * 65, "1 to 64 letters"),
    ("namespace", "a b", "1 to 64 letters"),
    ("namespace", "shop\n", "1 to 64 letters"),
    ("namespace", None, "1 to 64 letters"),
    ("store_url", "mongodb://h/db", "one of redis://"),
    ("store_url", "sqlite://", "one of redis://"),
    ("store_url", "sqlite:///:memory:", "one of redis://"),
    ("store_url", "", "one of redis://"),
    ("store_url", 5, "one of redis://"),
    ("store_url", "/path/only", "one of redis://"),
    ("create_schema", "yes", "True or False"),
    ("failed_queue", "", "a text that is not empty"),
    ("failed_queue", "  ", "a text that is not empty"),
    ("failed_queue", False, "a text that is not empty"),
    ("failed_routes", [("a", "b")], "a dict {task glob"),
    ("failed_routes", {"": "q"}, "a dict {task glob"),
    ("failed_routes", {"a": ""}, "a dict {task glob"),
    ("failed_routes", {"a": False}, "a dict {task glob"),
    ("failed_routes", {5: "q"}, "a dict {task glob"),
    ("failed_keep_days", 0, "a number of days above 0, or None"),
    ("failed_keep_days", "30d", "a number of days above 0, or None"),
    ("failed_max", 0, "a whole number from 1"),
    ("failed_max_mib", 0.5, "a number of MiB from 1, or None"),
    ("failed_max_mib", True, "a number of MiB from 1, or None"),
    ("failed_archive_dir", "", "the path of a folder"),
    ("collect_failed", 0, "True or False"),
    ("collect_queues", "dead", "a list of queue names"),
    ("collect_queues", [""], "a list of queue names"),
    ("collect_queues", [None], "a list of queue names"),
    ("spool_dir", "", "the path of a folder"),
    ("spool_dir", 5, "the path of a folder"),
    ("redact", "card", "a list of argument names"),
    ("redact", [""], "a list of argument names"),
    ("redact", [5], "a list of argument names"),
    ("max_crashes", 0, "a whole number from 1"),
    ("max_crashes", True, "a whole number from 1"),
    ("max_crashes", 2.0, "a whole number from 1"),
    ("max_crashes", "3", "a whole number from 1"),
    ("if_store_down", "fail", '"wait" or "run"'),
    ("if_store_down", None, '"wait" or "run"'),
    ("sessions", "on", '"auto", "strict" or "off"'),
    ("sessions", None, '"auto", "strict" or "off"'),
    ("circuits", ["bank"], "a dict {name of 1 to 64 characters: {option: value}}"),
    ("circuits", {"": {}}, "a dict {name of 1 to 64 characters"),
    ("circuits", {"x" * 65: {}}, "a dict {name of 1 to 64 characters"),
    ("circuits", {"bank": 5}, "a dict {name of 1 to 64 characters"),
    ("circuits", {"bank": {5: 5}}, "a dict {name of 1 to 64 characters"),
    ("retry_budgets", ["b"], "a dict {name of 1 to 64 characters: {option: value}}"),
    ("crash_window_s", 0, "a number of seconds above 0"),
    ("crash_window_s", -1, "a number of seconds above 0"),
    ("crash_window_s", True, "a number of seconds above 0"),
    ("crash_window_s", float("nan"), "a number of seconds above 0"),
    ("crash_window_s", "60", "a number of seconds above 0"),
    ("drain_timeout_s", 0, "a number of seconds above 0"),
    ("drain_timeout_s", "30", "a number of seconds above 0"),
    *[
        (name, value, 'a port from 1 to 65535, or "host:port"')
        for name in ("health_port", "metrics_port")
        for value in (0, 65_536, True, 80.0, "", "x", ":80", "h:", "h:70000", "::1:80")
    ],
    ("memory_recycle_mib", 0, "a number of MiB from 1, a share"),
    ("memory_recycle_mib", True, "a number of MiB from 1, a share"),
    ("memory_recycle_mib", "300", "a number of MiB from 1, a share"),
    ("memory_recycle_mib", "25 %", "a number of MiB from 1, a share"),
    ("memory_limit_mib", "0%", "a number of MiB from 1, a share"),
    ("memory_limit_mib", "101%", "a number of MiB from 1, a share"),
    ("memory_limit_mib", float("nan"), "a number of MiB from 1, a share"),
    ("memory_limit_mib", -300, "a number of MiB from 1, a share"),
    ("log_format", "xml", '"json", "logfmt" or None'),
    ("log_format", ["json"], '"json", "logfmt" or None'),
    ("release", "", "a text that is not empty"),
    ("release", 12, "a text that is not empty"),
]


def refusal(conf: dict[str, Any], **options: Any) -> str:
    """What is said about a wrong configuration."""
    with pytest.raises(ConfigurationError) as raised:
        read_settings(conf, **options)
    return str(raised.value)


@pytest.mark.parametrize(("name", "value", "read"), GOOD)
def test_a_good_value_is_read(name: str, value: Any, read: Any) -> None:
    """What is accepted arrives in the type that the code uses."""
    settings = read_settings({f"resilience_{name}": value})

    assert getattr(settings, name) == read
    assert type(getattr(settings, name)) is type(read)


@pytest.mark.parametrize(("name", "value", "accepted"), BAD)
def test_a_bad_value_is_refused(name: str, value: Any, accepted: str) -> None:
    """The refusal names the setting, what is accepted and the value."""
    said = refusal({f"resilience_{name}": value})

    assert said.startswith(f"resilience_{name} must be {accepted}")
    assert said.endswith(f", got {value!r}")


def test_every_setting_has_a_good_and_a_bad_value_here() -> None:
    """A new setting needs a line in both tables above."""
    names = set(Settings.__slots__)

    assert {name for name, *_ in GOOD} == names
    assert {name for name, *_ in BAD} == names


def test_the_defaults_need_no_configuration() -> None:
    """An app without a single setting is complete."""
    settings = read_settings({}, app_name="shop")

    assert settings == Settings(namespace="shop", failed_queue="shop.failed")
    assert settings.max_crashes == 3
    assert settings.crash_window_s == 3 * 86_400


def test_all_mistakes_are_told_at_once() -> None:
    """One start shows every wrong setting."""
    said = refusal(
        {
            "resilience_max_crashes": 0,
            "resilience_enabled": "no",
            "resilience_metrics_port": 0,
            "resilience_max_crashs": 3,
            "resilience_log_format": "json",
        }
    )

    assert len(said.split("; ")) == 4
    assert "resilience_max_crashes must be" in said
    assert "resilience_enabled must be" in said
    assert "resilience_metrics_port must be" in said
    assert "unknown setting resilience_max_crashs" in said
    assert "log_format" not in said


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("max_crashs", "max_crashes"),
        ("failed_que", "failed_queue"),
        ("store_uri", "store_url"),
        ("metric_port", "metrics_port"),
    ],
)
def test_a_misspelt_setting_gets_a_suggestion(wrong: str, meant: str) -> None:
    """A near name is guessed, those of later releases too."""
    said = refusal({f"resilience_{wrong}": 1})

    assert said == (
        f"unknown setting resilience_{wrong}, did you mean resilience_{meant}?"
    )


def test_a_file_in_the_place_of_a_host_is_told_as_it_should_be() -> None:
    """A database of SQLite has no host."""
    assert refusal({"resilience_store_url": "sqlite://shop.db"}) == (
        "resilience_store_url must be written with three slashes, sqlite:///shop.db, or "
        "four before an absolute path, got 'sqlite://shop.db'"
    )


def test_an_option_of_tasks_is_no_setting() -> None:
    """It is told where it belongs."""
    assert refusal({"resilience_idempotency_keep_s": 1}) == (
        "resilience_idempotency_keep_s is no setting: idempotency_keep_s is an option of "
        "a task"
    )


def test_an_unknown_setting_without_a_near_name_gets_no_suggestion() -> None:
    """A wild guess would mislead."""
    assert refusal({"resilience_zzz": 1}) == "unknown setting resilience_zzz"


def test_settings_of_others_are_left_alone() -> None:
    """Only what begins with resilience_ is ours."""
    conf = {"broker_url": 5, "max_crashes": "x", "my_resilience_enabled": "x"}

    assert read_settings(conf) == read_settings({})


def test_django_settings_have_the_apps_prefix() -> None:
    """CELERY_RESILIENCE_MAX_CRASHES is resilience_max_crashes."""
    conf = {"CELERY_RESILIENCE_MAX_CRASHES": 7, "CELERY_BROKER_URL": "x", "DEBUG": True}

    assert read_settings(conf, prefix="CELERY_").max_crashes == 7


@pytest.mark.parametrize(
    ("prefix", "key", "meant"),
    [
        ("CELERY_", "CELERY_RESILIENCE_STOR_URL", "CELERY_RESILIENCE_STORE_URL"),
        ("SHOP_Q_", "SHOP_Q_RESILIENCE_STOR_URL", "SHOP_Q_RESILIENCE_STORE_URL"),
        ("", "RESILIENCE_STOR_URL", "RESILIENCE_STORE_URL"),
        ("CELERY_", "resilience_stor_url", "resilience_store_url"),
        ("CELERY_", "CELERY_RESILIENCE_ZZZ", None),
        ("CELERY_", "CELERY_RESILIENCE_", None),
    ],
)
def test_a_misspelt_setting_is_told_as_the_user_wrote_it(
    prefix: str, key: str, meant: str | None
) -> None:
    """With his prefix and in his case, and so is what he may have meant."""
    guess = f", did you mean {meant}?" if meant else ""

    assert refusal({key: "x"}, prefix=prefix) == f"unknown setting {key}{guess}"


def test_a_wrong_value_is_told_by_the_name_that_the_user_wrote() -> None:
    """Each of them."""
    wrong = {
        "CELERY_RESILIENCE_MAX_CRASHES": "x",
        "CELERY_RESILIENCE_METRICS_PORT": 0,
    }
    crashes, port = refusal(wrong, prefix="CELERY_").split("; ")

    assert crashes.startswith("CELERY_RESILIENCE_MAX_CRASHES must be a whole number")
    assert port.startswith("CELERY_RESILIENCE_METRICS_PORT must be a port")


def test_a_prefixed_key_means_nothing_without_the_prefix() -> None:
    """Another app's namespace is not ours."""
    conf = {"CELERY_RESILIENCE_MAX_CRASHES": 7}

    assert read_settings(conf).max_crashes == 3


@pytest.mark.parametrize("name", sorted(NOT_IN_THIS_RELEASE))
def test_a_later_feature_may_be_declined_but_not_asked_for(name: str) -> None:
    """Only the value that asks for nothing is accepted of what is not there yet."""
    nothing = NOT_IN_THIS_RELEASE[name]

    assert read_settings({f"resilience_{name}": nothing}) == read_settings({})
    said = refusal({f"resilience_{name}": "something"})
    assert said.startswith(f"resilience_{name} is not in this release")
    assert said.endswith("got 'something'")


@pytest.mark.parametrize(
    ("app_name", "namespace"),
    [
        ("shop", "shop"),
        ("shop.celery", "shop.celery"),
        ("my shop/é", "my-shop--"),
        ("n" * 70, "n" * 64),
        ("__main__", "celery"),
        ("", "celery"),
        (None, "celery"),
    ],
)
def test_the_default_namespace_is_the_apps_name(
    app_name: str | None, namespace: str
) -> None:
    """Without what a key, row or queue could not hold."""
    settings = read_settings({}, app_name=app_name)

    assert settings.namespace == namespace
    assert settings.failed_queue == f"{namespace}.failed"


@given(st.text(max_size=100) | st.none())
def test_every_apps_name_gives_an_acceptable_namespace(app_name: str | None) -> None:
    """The default always passes the check of the setting."""
    namespace = default_namespace(app_name)

    assert read_settings({"resilience_namespace": namespace}).namespace == namespace


def test_the_failed_queue_follows_the_namespace() -> None:
    """Two apps of one broker do not share a failed queue by accident."""
    settings = read_settings({"resilience_namespace": "eu"}, app_name="shop")

    assert settings.failed_queue == "eu.failed"


def test_a_failed_queue_that_is_set_is_kept() -> None:
    """The default gives way to it."""
    conf = {"resilience_failed_queue": "inbox", "resilience_namespace": "eu"}

    assert read_settings(conf).failed_queue == "inbox"


# --- choose_store ---------------------------------------------------------------------

HERE = Path("/srv/shop")
BESIDE = "sqlite:////srv/shop/shop.resilience.sqlite3"
SQLITE = "sqlite:////data/x.sqlite3"
POSTGRESQL = "postgresql+psycopg://u:p@h/db"
MYSQL = "mysql+pymysql://u:p@h/db"

CHOICES = [
    # store_url, broker, result backend, url, a part of why
    (SQLITE, "redis://h", "redis://h/1", SQLITE, "resilience_store_url"),
    (SQLITE, "filesystem://", f"db+{POSTGRESQL}", SQLITE, "resilience_store_url"),
    ("sqlite:///x.db", "redis://h", None, "sqlite:////srv/shop/x.db", "store_url"),
    (None, "amqp://h", "db+sqlite:///r.db", "sqlite:////srv/shop/r.db", "backend"),
    ("redis://:p@s/3", "amqp://h", None, "redis://:p@s/3", "resilience_store_url"),
    (None, "redis://h", f"db+{POSTGRESQL}", "redis://h", "the broker"),
    (None, "rediss://h/4", None, "rediss://h/4", "the broker"),
    (None, "redis+socket:///r.sock", None, "redis+socket:///r.sock", "the broker"),
    (None, "redis://:p@a;redis://:p@b", None, "redis://:p@a", "the broker"),
    (None, "amqp://h", f"db+{POSTGRESQL}", POSTGRESQL, "the result backend"),
    (None, "amqp://h", f"db+{SQLITE}", SQLITE, "the result backend"),
    (None, "filesystem://", f"db+{SQLITE}", SQLITE, "the result backend"),
    (None, "redis://h", f"db+{MYSQL}", "redis://h", "the broker"),
    (None, "filesystem://", f"db+{MYSQL}", MYSQL, "the result backend"),
    (None, "amqp://h", "db+mariadb://h/db", "mariadb://h/db", "the result backend"),
    (None, "filesystem://", "db+oracle://h/db", BESIDE, "beside the app, as filesyst"),
    (None, "filesystem://", "file:///r", BESIDE, "beside the app, as filesystem"),
    (None, "filesystem://", None, BESIDE, "beside the app, as filesystem"),
    (None, "memory://", None, BESIDE, "beside the app, as memory"),
    (None, "sqla+sqlite:///b.sqlite3", None, BESIDE, "beside the app, as sqla"),
    (None, "sqlalchemy+sqlite:///b", None, BESIDE, "beside the app, as sqlalchemy"),
    (None, "sentinel://h:26379", "redis://h/1", None, "set resilience_store_url"),
    (None, "sqs://", "cache+memcached://h", None, "set resilience_store_url"),
    (None, "amqp://h", "rpc://", None, "set resilience_store_url"),
    (None, "amqp://h", "db+oracle://h/db", None, "set resilience_store_url"),
    (None, "amqp://h", POSTGRESQL, None, "set resilience_store_url"),
    (None, "pyamqp://h", "", None, "set resilience_store_url"),
]


@pytest.mark.parametrize(("own", "broker", "backend", "url", "why"), CHOICES)
def test_the_store_follows_from_what_the_app_has(
    own: str | None, broker: str, backend: str | None, url: str | None, why: str
) -> None:
    """The setting, the broker if it is Redis, a database, beside a local broker."""
    settings = Settings(namespace="shop", store_url=own)

    choice = choose_store(
        settings, broker_url=broker, result_backend=backend, app_dir=HERE
    )

    assert choice.url == url
    assert why in choice.why


@pytest.mark.parametrize(
    ("own", "tls", "url", "options"),
    [
        (None, {"ssl_ca_certs": "/c"}, "rediss://h", {"ssl_ca_certs": "/c"}),
        (None, True, "rediss://h", None),
        (None, None, "redis://h", None),
        ("redis://other", {"ssl_ca_certs": "/c"}, "redis://other", None),
    ],
)
def test_the_brokers_tls_is_for_the_broker_only(
    own: str | None, tls: Any, url: str, options: Any
) -> None:
    """A store of its own has what its URL says."""
    choice = choose_store(
        Settings(store_url=own),
        broker_url="redis://h",
        result_backend=None,
        app_dir=HERE,
        broker_tls=tls,
    )

    assert (choice.url, choice.tls) == (url, options)


def test_no_store_says_what_to_write() -> None:
    """The reason holds a URL for every kind of store."""
    choice = choose_store(
        Settings(), broker_url="amqp://h", result_backend=None, app_dir=HERE
    )

    assert all(url in choice.why for url in STORES.values())
    assert "stay in their queue" in choice.why


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@h:5/db", "postgresql://u:***@h:5/db"),
        ("postgresql://u:p@ss@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:%40x@h/db", "postgresql://u:***@h/db"),
        ("postgresql://db:db@db/db", "postgresql://db:***@db/db"),
        ("postgresql://u:u@h/u:u@x", "postgresql://u:***@h/u:u@x"),
        ("postgresql://:hunter2@h/db", "postgresql://:***@h/db"),
        ("postgresql://u@h/db", "postgresql://u@h/db"),
        ("mysql+pymysql://u:hunter2@h/db", "mysql+pymysql://u:***@h/db"),
        ("sqlite:////a/b.sqlite3", "sqlite:////a/b.sqlite3"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """Only the password is masked."""
    assert without_password(url) == shown


def test_a_url_that_cannot_be_split_is_one_of_the_mistakes() -> None:
    """It is told with the others, not instead of them."""
    said = refusal(
        {
            "resilience_store_url": "postgresql://[host/db",
            "resilience_max_crashes": 0,
        }
    )

    assert "resilience_store_url must be one of" in said
    assert "resilience_max_crashes must be" in said


def test_a_refused_url_is_told_every_kind_of_store() -> None:
    """Each as a URL to write, so that nobody has to look it up."""
    said = refusal({"resilience_store_url": "mongodb://h/db"})

    for kind in ("postgresql+psycopg", "mysql+pymysql", "mariadb+pymysql"):
        assert f"{kind}://user:password@host/database" in said
    assert "sqlite:////absolute/path" in said


def test_a_refused_url_does_not_show_its_password() -> None:
    """The refusal ends up in logs."""
    said = refusal({"resilience_store_url": "mongodb://u:hunter2@h/db"})

    assert "resilience_store_url must be one of" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("url", ["sqlite:foo", "postgresql://h:port/db", "mysql:h"])
def test_a_url_that_sqlalchemy_cannot_read_is_refused_at_the_start(url: str) -> None:
    """And not by a traceback at first use; `check_url` is not called anywhere."""
    said = refusal({"resilience_store_url": url})

    assert "resilience_store_url must be" in said


@pytest.mark.parametrize("scheme", ["sqla+postgresql", "sqlalchemy+mysql"])
def test_a_database_broker_on_another_host_is_not_local(scheme: str) -> None:
    """Each host would have a store of its own, beside the app."""
    choice = choose_store(
        Settings(), broker_url=f"{scheme}://h/db", result_backend=None, app_dir=HERE
    )

    assert choice.url is None


def test_a_password_in_a_urls_query_is_masked_too() -> None:
    """libpq and SQLAlchemy take it there."""
    shown = without_password("postgresql://h/db?user=u&password=hunter2")

    assert "hunter2" not in shown


def test_a_refused_url_with_a_slash_in_its_password_does_not_show_it() -> None:
    """Written without its %2F, which is why it is refused."""
    said = refusal({"resilience_store_url": "postgresql://u:hun/ter2@h/db"})

    assert "resilience_store_url must be one of" in said
    assert "ter2" not in said
