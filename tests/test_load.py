"""shard_config.load, by files whose names say the verdict; a `.bad.yml` ends with the errors that it has to give."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_config.document import SIZE_BYTES_MAX, did_you_mean, parse
from shard_config.known import known_regions, shipped_services
from shard_config.load import ConfigErrors, load, loads
from shard_config.model import (
    S3,
    Account,
    Aws,
    Budget,
    Config,
    Defaults,
    ExpositionJob,
    Heal,
    Kafka,
    KafkaSecurity,
    Limits,
    MetricProfile,
    Organization,
    Postgres,
    Resources,
    Run,
    Selection,
    ServiceProfile,
)
from shard_config.price_list import PriceList
from shard_config.remote_write import Receiver, RemoteWrite, ServiceSeries

CONFIGS = Path(__file__).parent / "config"
DOCUMENTATION = Path(__file__).parents[1] / "docs" / "configuration.md"
ENVIRON = {"HEADGATE_TEST_SECRET": "s3cr3t"}
EXPECTED = "# Expected:\n"

MINIMAL = """
accounts:
  - {id: "123456789012", regions: [eu-west-1], services: [ec2]}
"""


def config_of(text: str) -> Config:
    return loads(text, "headgate.yaml", ENVIRON)


def errors_of(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        loads(text, "headgate.yaml", ENVIRON if environ is None else environ)
    return str(caught.value).splitlines()


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.bad.yml")), ids=lambda p: p.name)
def test_a_bad_file_gives_all_of_its_errors_at_once(path: Path) -> None:
    _, expected = path.read_text().split(EXPECTED)
    with pytest.raises(ConfigErrors) as caught:
        load(path, environ=ENVIRON)
    assert str(caught.value).splitlines() == [
        f"{path}:{line.removeprefix('# ')}" for line in expected.splitlines()
    ]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.ok.yml")), ids=lambda p: p.name)
def test_a_good_file_loads(path: Path) -> None:
    config = load(path, environ=ENVIRON)
    assert config.accounts or config.exposition or config.organization


def test_all_that_a_file_can_say_arrives() -> None:
    config = load(CONFIGS / "everything.ok.yml", environ=ENVIRON)
    production, china, third = config.accounts
    assert production.regions == ("eu-west-1", "us-east-1")
    assert production.services == china.services == ("ec2", "ebs", "sqs")
    assert china.regions == ("cn-north-1",)
    assert third.id == "089012345678"
    assert production.external_id is not None
    assert production.external_id.get_secret_value() == "s3cr3t"
    assert config.postgres.password is not None
    assert config.postgres.password.get_secret_value() == "a secret of the tests"
    assert config.kafka.topic("raw") == "prod.raw"
    assert config.slots == 48
    assert config.aws.statistics_count_once


def test_the_services_in_use_are_the_shipped_ones_with_the_overrides() -> None:
    config = load(CONFIGS / "everything.ok.yml", environ=ENVIRON)
    services = config.service_by_name
    assert sorted(services) == ["ebs", "ec2", "ours", "s3", "sqs"]
    assert services["ec2"] == shipped_services()["ec2"]
    assert services["sqs"] == ServiceProfile(
        service="sqs",
        namespace="AWS/SQS",
        poll_interval_s=60,
        settling_s=240,
        metrics="all",
        statistics=("Sum", "p99.9"),
        resources=shipped_services()["sqs"].resources,
    )
    assert services["ours"].namespace == "Ours/Shop"


def test_a_file_that_is_not_there_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with pytest.raises(ConfigErrors, match=rf"^{re.escape(str(path))}: cannot be read: No such file"):
        load(path, environ={})


def test_bytes_that_are_no_text_are_an_error_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_bytes(b"accounts:\n  - \xff\n")
    with pytest.raises(ConfigErrors, match=r"headgate.yaml:2: not UTF-8 text$"):
        load(path, environ={})


# --- bounds ---------------------------------------------------------------------------------------------------


def test_a_file_beyond_5_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_bytes(b"#" * (SIZE_BYTES_MAX + 1))
    with pytest.raises(ConfigErrors, match=r":1: the file has 5,000,001 bytes; at most 5,000,000 are read$"):
        load(path, environ={})


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "a:\n"])
def test_nesting_is_bounded_and_quickly_so(opening: str) -> None:
    text = "".join(" " * i + opening for i in range(500)) if opening == "a:\n" else opening * 1_000_000
    start_s = time.process_time()
    [error] = errors_of(text)
    assert error.endswith("nested deeper than 20 levels")
    assert time.process_time() - start_s < 2


def test_a_few_aliases_are_welcome_and_a_bomb_is_not() -> None:
    listed = ", ".join(["x"] * 99)
    assert parse(f"a: &a [{listed}]\nb: [{', '.join(['*a'] * 100)}]", "f", []).get("b") is not None
    [error] = errors_of(f"a: &a [{listed}]\nb: [{', '.join(['*a'] * 101)}]")
    assert error.startswith("headgate.yaml:2: b[100]: aliases repeat more than 10,000 values")


# --- whatever stands there ------------------------------------------------------------------------------------

KEYS = sorted(
    {
        key
        for model in (Config, Defaults, Account, ExpositionJob, ServiceProfile)
        for key in model.model_fields
    }
)
anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(KEYS)
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*KEYS, "ec2", "env", "file", "kafka.bootstrap", "7"]), inner, max_size=4
        )
    ),
    max_leaves=20,
)


def assert_loads_or_says_where(text: str) -> None:
    """No exception but ConfigErrors, and each error within the text."""
    try:
        loads(text, "headgate.yaml", {})
    except ConfigErrors as caught:
        errors = caught.errors
    else:
        return
    assert len(str(ConfigErrors(errors)).splitlines()) == len(errors) > 0
    assert [error for error in errors if not 1 <= error.line <= text.count("\n") + 1] == []


@given(st.dictionaries(st.sampled_from([*Config.model_fields, "defaults"]), anything, max_size=5))
@settings(deadline=None)
def test_any_structure_loads_or_says_what_is_wrong(document: dict[str, object]) -> None:
    assert_loads_or_says_where(yaml.safe_dump(document))


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_any_damage_to_a_good_file_loads_or_says_what_is_wrong(data: st.DataObject) -> None:
    text = (CONFIGS / "everything.ok.yml").read_text()
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 12))
    new = data.draw(
        st.text(max_size=4) | st.sampled_from(["\n", "- ", "{", "]", ": ", "&a ", "*usual", "'", "!x ", "\t"])
    )
    assert_loads_or_says_where(text[:at] + new + text[at + cut :])


# --- YAML as it looks -----------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20))
@settings(deadline=None)
def test_text_that_pyyaml_writes_reads_back_the_same(text: str) -> None:
    assert parse(yaml.safe_dump({"key": text}), "f", []).plain() == {"key": text}


@given(
    st.one_of(st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
)
@settings(deadline=None)
def test_numbers_that_pyyaml_writes_read_back_the_same(value: float) -> None:
    assert parse(yaml.safe_dump({"key": value}), "f", []).plain() == {"key": value}


@pytest.mark.parametrize(
    "word", ["no", "yes", "on", "off", "y", "0x1f", "1:30", "2026-01-01", "1_000", ".inf", "="]
)
def test_words_are_text(word: str) -> None:
    assert parse(f"key: {word}", "f", []).plain() == {"key": word}


# --- what the rest relies on ----------------------------------------------------------------------------------


def test_unset_variables_change_nothing_and_set_ones_beat_the_file() -> None:
    text = MINIMAL + "kafka: {bootstrap: a:9092, replication: 3}\npostgres: {dsn: postgresql://a/b}\n"
    untouched = loads(text, "f", {"HEADGATE_KAFKA_BOOTSTRAP": ""})
    assert (untouched.kafka.bootstrap, untouched.postgres.dsn) == ("a:9092", "postgresql://a/b")
    environ = {
        "HEADGATE_KAFKA_BOOTSTRAP": "b:9092",
        "HEADGATE_POSTGRES_DSN": "postgresql://b/c",
        "HEADGATE_S3_ENDPOINT_URL": "http://minio:9000",
    }
    config = loads(text, "f", environ)
    assert (config.kafka.bootstrap, config.kafka.replication) == ("b:9092", 3)
    assert config.postgres.dsn == "postgresql://b/c"
    assert config.s3.endpoint_url == "http://minio:9000"


def test_a_wrong_variable_is_named_and_its_secret_is_not() -> None:
    environ = {"HEADGATE_POSTGRES_DSN": "hunter2", "HEADGATE_S3_ENDPOINT_URL": "minio:9000"}
    assert errors_of(MINIMAL, environ) == [
        "$HEADGATE_POSTGRES_DSN: postgres.dsn: a DSN is postgresql://user@host:port/database",
        "$HEADGATE_S3_ENDPOINT_URL: s3.endpoint_url: an endpoint is an http or https URL without credentials",
    ]


def test_a_secret_is_in_no_representation_of_a_configuration() -> None:
    config = load(CONFIGS / "everything.ok.yml", environ=ENVIRON)
    for text in (repr(config), str(config), config.model_dump_json()):
        assert "s3cr3t" not in text
        assert "a secret of the tests" not in text


def test_the_secret_file_of_a_secret_is_bounded_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * 70_000)
    (tmp_path / "empty").write_text("\n")
    for name, what in (("long", "too long for a secret"), ("empty", "empty")):
        text = MINIMAL + f"postgres: {{password: {{file: {name}}}}}"
        with pytest.raises(ConfigErrors, match=f"postgres.password: {name} is {what}$"):
            loads(text, str(tmp_path / "headgate.yaml"), {})


def test_the_revision_depends_on_what_is_asked_for_alone() -> None:
    base = """
accounts:
  - {id: "123456789012", regions: [eu-west-1, us-east-1], services: [ec2, sqs]}
  - {id: "210987654321", regions: [eu-west-1], services: [ec2]}
exposition:
  - {name: a, account: lab, region: one, endpoints: [http://a/metrics]}
  - {name: b, account: lab, region: one, endpoints: [http://b/metrics]}
"""
    same = """
slots: 99
postgres: {dsn: postgresql://elsewhere/x, password: hunter2}
exposition:
  - {name: b, account: lab, region: one, endpoints: [http://elsewhere/metrics]}
  - {name: a, account: lab, region: one, endpoints: [http://a/metrics], timeout_s: 3}
accounts:
  - {id: "210987654321", regions: [eu-west-1], services: [ec2], budget_usd_per_day: 5}
  - {id: "123456789012", regions: [us-east-1, eu-west-1], services: [sqs, ec2], external_id: x}
services: {ec2: {priority: 5}, sns: {period_s: 300}}
"""
    assert config_of(base).revision == config_of(same).revision


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("regions: [eu-west-1]", "regions: [eu-west-2]"),
        ("services: [ec2]", "services: [ec2, ebs]"),
        ('id: "123456789012"', 'id: "123456789013"'),
        ("accounts:", "services: {ec2: {poll_interval_s: 600}}\naccounts:"),
        ("accounts:", "services: {ec2: {settling_s: 1200}}\naccounts:"),
        ("accounts:", "services: {ec2: {metrics: all}}\naccounts:"),
        ("accounts:", "exposition: [{name: a, account: a, region: b, endpoints: [http://a]}]\naccounts:"),
    ],
)
def test_what_is_asked_for_changes_the_revision(before: str, after: str) -> None:
    changed = MINIMAL.replace(before, after)
    assert changed != MINIMAL
    assert config_of(changed).revision != config_of(MINIMAL).revision


def test_the_revision_is_pinned() -> None:
    """Another one would give every task of every installation another id."""
    text = MINIMAL.replace("ec2", "ours") + "services: {ours: {namespace: Ours}}"
    assert config_of(text).revision == "fd9efd319d65613f"


# --- what is shipped ------------------------------------------------------------------------------------------


def test_every_shipped_profile_is_sound_and_named_like_its_file() -> None:
    profiles = shipped_services()
    assert len(profiles) >= 19
    for name, profile in profiles.items():
        assert profile.service == name
        assert profile.namespace.startswith("AWS/") or name == "eks"
        assert profile.metrics != "all"
        assert profile.resources is not None


def test_shipped_profiles_settle_on_the_poll_grid() -> None:
    assert [p.service for p in shipped_services().values() if p.settling_s % p.poll_interval_s] == []


def test_daily_metrics_are_never_discovered_by_recent_activity() -> None:
    daily = [p for p in shipped_services().values() if p.period_s >= 10_800]
    assert [p.service for p in daily] == ["s3"]
    assert not any(p.recently_active for p in daily)


def test_regions_of_all_partitions_are_known_and_endpoints_of_fips_are_none() -> None:
    assert {"eu-west-1", "cn-north-1", "us-gov-west-1"} <= known_regions()
    assert not any("fips" in region for region in known_regions())


def test_a_suggestion_prefers_the_same_letters_and_ignores_case() -> None:
    assert did_you_mean("us-esat-1", ["us-west-1", "us-east-1"]) == 'did you mean "us-east-1"?'
    assert did_you_mean("LAMBDA", ["lambda"]) == 'did you mean "lambda"?'
    assert did_you_mean("xyzzy", ["lambda"]) == ""


# --- the documentation ----------------------------------------------------------------------------------------


def examples() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", DOCUMENTATION.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(2))
def test_the_examples_of_the_documentation_load(number: int) -> None:
    environ = {"HEADGATE_EXTERNAL_ID": "x", "HEADGATE_POSTGRES_PASSWORD": "y"}
    config = loads(examples()[number], "example.yaml", environ)
    assert len(config.accounts) == (1, 3)[number]


def test_the_documentation_names_every_key_and_every_service() -> None:
    text = DOCUMENTATION.read_text()
    sections = (
        Aws,
        Kafka,
        KafkaSecurity,
        Postgres,
        S3,
        Limits,
        Heal,
        Budget,
        Organization,
        Selection,
        Resources,
        PriceList,
        Receiver,
        RemoteWrite,
        Run,
        ServiceSeries,
    )
    models = (Config, Defaults, Account, ExpositionJob, ServiceProfile, MetricProfile, *sections)
    keys = {key for model in models for key in model.model_fields}
    assert [word for word in sorted(keys | set(shipped_services())) if f"`{word}`" not in text] == []


def test_what_the_store_no_longer_keeps_is_dead_on_arrival() -> None:
    assert config_of(MINIMAL).landing_limits.retention_s == 455 * 86_400
    kept = config_of(MINIMAL + "samples_retention_days: 30")
    assert (kept.limits.retention_s, kept.landing_limits.retention_s) == (455 * 86_400, 30 * 86_400)


RECEIVERS = """
remote_write:
  receivers:
    - {name: one, url: "http://127.0.0.1:9090/api/v1/write", out_of_order_window_s: 7200, bearer_token: {env: TOKEN}}
    - {name: two, url: "http://127.0.0.1:9091/api/v1/write", username: headgate, password: {env: TOKEN}}
  services:
    lambda: {nil_to_zero: ["Errors|Throttles"], exported_tags: [team]}
"""


def test_receivers_secrets_come_from_where_the_file_says() -> None:
    config = loads(MINIMAL + RECEIVERS, "headgate.yaml", {"TOKEN": "t0ken"})
    assert config.remote_write is not None
    one, two = config.remote_write.receivers
    assert one.bearer_token is not None
    assert two.password is not None
    assert (one.bearer_token.get_secret_value(), two.password.get_secret_value()) == ("t0ken", "t0ken")
    assert "t0ken" not in repr(config)
    # Where samples go besides decides nothing about what is asked for.
    assert config.revision == config_of(MINIMAL).revision


def test_a_receiver_that_is_there_twice_is_an_error_with_its_line() -> None:
    with pytest.raises(ConfigErrors) as raised:
        loads(MINIMAL + RECEIVERS.replace("name: two", "name: one"), "headgate.yaml", {"TOKEN": "x"})
    assert "one stands there twice" in str(raised.value)
