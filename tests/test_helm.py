"""The chart: what it renders is valid, safe, and changes only where it should; its schema, comments and README agree with its values."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shard_config.load import loads
from shard_config.model import Config, Kafka
from tests.helm_chart import (
    CHART,
    GOLDEN,
    KUBERNETES,
    SCENARIOS,
    Manifest,
    helm,
    looked_at,
    manifests,
    readme,
    schema_text,
    template,
    tool,
    values_of,
)
from workers import exporter, reading
from workers.names import landing_group, remote_write_group

MADE = "run `make helm-docs`"
CRDS = "PodMonitor,PrometheusRule,ScaledObject,TriggerAuthentication"
"""Other projects' kinds, whose schemas are not Kubernetes' own."""

needs_helm = pytest.mark.skipif(
    tool("helm") is None, reason="no helm here; `make test` builds it where Go is"
)
by_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda p: p.stem)
VALUES_TEXT = (CHART / "values.yaml").read_text()
VALUES: dict[str, Any] = yaml.safe_load(VALUES_TEXT)
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


@pytest.fixture(scope="session")
def rendered() -> Callable[..., dict[str, Manifest]]:
    """The manifests of a scenario (by its name) with `--set`s, by kind/name; rendered once each."""
    known: dict[tuple[str, ...], dict[str, Manifest]] = {}

    def render(name: str, *sets: str) -> dict[str, Manifest]:
        if (name, *sets) not in known:
            known[(name, *sets)] = manifests(template(CHART / "ci" / f"{name}.yaml", *sets))
        return copy.deepcopy(known[(name, *sets)])

    return render


Render = Callable[..., dict[str, Manifest]]


def pods(found: dict[str, Manifest]) -> dict[str, Manifest]:
    """The pod templates, by the kind/name of what makes them."""
    return {name: m["spec"]["template"] for name, m in found.items() if "template" in m.get("spec", {})}


def worker_pods(found: dict[str, Manifest]) -> dict[str, Manifest]:
    return {name: pod for name, pod in pods(found).items() if name.startswith("Deployment/")}


# --- what is rendered -------------------------------------------------------------------------------------------


@needs_helm
@by_scenario
def test_a_scenario_renders_what_was_looked_at(scenario: Path) -> None:
    assert looked_at(scenario) == (GOLDEN / scenario.name).read_text(), MADE


def test_there_is_a_golden_for_each_scenario_and_no_other() -> None:
    assert [p.name for p in sorted(GOLDEN.glob("*.yaml"))] == [p.name for p in SCENARIOS]
    assert len(SCENARIOS) >= 8


@needs_helm
def test_helm_lint_has_nothing_to_say() -> None:
    done = helm("lint", "--strict", CHART, *(word for s in SCENARIOS[:1] for word in ("--values", s)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.skipif(
    tool("kubeconform") is None, reason="no kubeconform here; `make test` builds it where Go is"
)
def test_every_scenario_is_valid_kubernetes(tmp_path: Path) -> None:
    schemas = (
        Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    )
    there = tmp_path / f"v{KUBERNETES}-standalone-strict"
    there.mkdir()
    # The package's schemas name their definitions by an absolute path, and kubeconform looks beside them.
    for path in schemas.glob("*.json"):
        schema = json.loads(path.read_text())
        schema.pop("$id", None)
        text = json.dumps(schema).replace('"/api/_definitions.json', '"_definitions.json')
        (there / path.name).write_text(text)
    command = [tool("kubeconform") or "", "-strict", "-summary", "-output", "json", "-skip", CRDS]
    command += ["-kubernetes-version", KUBERNETES, "-schema-location", str(tmp_path)]
    files = [str(GOLDEN / s.name) for s in SCENARIOS]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=60, check=False)
    answer = json.loads(done.stdout)
    assert answer["resources"] == []
    assert answer["summary"]["invalid"] == answer["summary"]["errors"] == 0
    assert answer["summary"]["skipped"] == 7
    assert answer["summary"]["valid"] > 100


@needs_helm
@by_scenario
def test_the_configuration_that_is_mounted_is_one_that_headgate_takes(
    scenario: Path, rendered: Render, tmp_path: Path
) -> None:
    found = rendered(scenario.stem)
    maps = [m["data"] for name, m in found.items() if name.startswith("ConfigMap/")]
    texts = {data["headgate.yaml"] for data in maps if "headgate.yaml" in data}  # dashboards are maps, too
    assert len(texts) == 1  # setup's is the workers'
    text = texts.pop().replace("/etc/headgate-secrets", str(tmp_path))
    (tmp_path / "external-id").write_text("of-a-test")
    named = next(iter(worker_pods(found).values()))["spec"]["containers"][0].get("env", [])
    dsn = {"HEADGATE_POSTGRES_DSN": "postgresql://of-a-test@postgres/headgate"}
    config = loads(text, "headgate.yaml", {one["name"]: "of-a-test" for one in named} | dsn)
    given = yaml.safe_load(scenario.read_text())["config"]
    assert config.slots == 64
    assert config.samples_retention_days == 7
    assert config.kafka.raw_retention_s == 48 * 3600
    assert config.kafka.raw_partitions == given.get("kafka", {}).get("raw_partitions", 8)


@needs_helm
def test_values_reach_headgate_as_they_were_written(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    # What one YAML reader takes for a number, a time or a truth, and another does not; and numbers that Go prints with an exponent.
    values.write_text("""
config:
  accounts:
    - {id: "012345678901", alias: "1:30", regions: [eu-west-1], services: [ec2]}
    - {id: "000000000017", alias: "yes", regions: [eu-west-1], services: [ec2]}
  limits: {points_per_batch_max: 12345678}
  aws: {usd_per_1000_metrics: 0.0100001}
  kafka: {prefix: "1e3"}
""")
    found = manifests(template(values))
    config = loads(found["ConfigMap/headgate"]["data"]["headgate.yaml"], "headgate.yaml", {})
    assert [(a.id, a.alias) for a in config.accounts] == [("012345678901", "1:30"), ("000000000017", "yes")]
    assert config.limits.points_per_batch_max == 12_345_678
    assert config.aws.usd_per_1000_metrics == 0.0100001
    assert config.kafka.prefix == "1e3"


# --- shards -----------------------------------------------------------------------------------------------------


@needs_helm
@pytest.mark.parametrize(("before", "after"), [(3, 5), (5, 2), (1, 64)])
def test_another_number_of_shards_touches_only_those_that_come_or_go(
    rendered: Render, before: int, after: int
) -> None:
    was, becomes = (rendered("minimal", f"shards={n}") for n in (before, after))
    few, many = sorted((before, after))
    changed = {name for name in was.keys() | becomes.keys() if was.get(name) != becomes.get(name)}
    assert changed == {f"Deployment/headgate-exporter-{n}" for n in range(few + 1, many + 1)}


@needs_helm
def test_each_shard_is_one_pod_with_its_index_for_an_identity(rendered: Render) -> None:
    found = rendered("eight-shards")
    shards = {n: found[f"Deployment/headgate-exporter-{n}"] for n in range(1, 9)}
    assert "Deployment/headgate-exporter-0" not in found
    assert "Deployment/headgate-exporter-9" not in found
    selectors = {json.dumps(d["spec"]["selector"], sort_keys=True) for d in shards.values()}
    assert len(selectors) == 8
    for n, shard in shards.items():
        assert (shard["spec"]["replicas"], shard["spec"]["strategy"]) == (1, {"type": "Recreate"})
        args = shard["spec"]["template"]["spec"]["containers"][0]["args"]
        assert args[:3] == ["exporter", "--shard", f"exporter-{n}"]


@needs_helm
@pytest.mark.parametrize(
    ("change", "rolls"),
    [
        ("config.kafka.bootstrap=other:9092", True),
        ("config.slots=96", True),
        ("secretEnv.X.value=y", True),
        ("config.accounts[0].alias=production", False),
        ("config.budget.usd_per_day=10", False),
        (
            "config.remote_write.receivers[0].name=a,config.remote_write.receivers[0].url=http://a:9090/write",
            False,
        ),
        ("dashboards.enabled=true,prometheusRule.enabled=true", False),
        ("sinks.postgres.autoscaling.max=4", False),
        ("networkPolicy.enabled=false", False),
    ],
)
def test_what_workers_take_up_while_they_run_restarts_none(
    rendered: Render, change: str, rolls: bool
) -> None:
    was, becomes = (worker_pods(rendered("minimal", *sets)) for sets in ([], [change]))
    assert len(was) == 5
    assert {name for name in was if was[name] != becomes[name]} == (set(was) if rolls else set())


@needs_helm
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("shards=65", "more than config.slots: 64"),
        ("sinks.postgres.autoscaling.max=9", "more pods than config.kafka.raw_partitions: 8"),
        ("config.remote_write.receivers[0].name=a", "url"),
        (
            "config.remote_write.receivers[0].name=a,config.remote_write.receivers[0].url=http://a:8428/write",
            "receiver a: nothing is let out to port 8428",
        ),
        ("sinks.remoteWrite.autoscaling.by=load", "/sinks/remoteWrite"),
        ("prometheusRule.runbookUrl=wiki", "/prometheusRule/runbookUrl"),
        ("shards=0", "/shards"),
        ("shard=4", "'shard'"),
        ("config.kafka.bootsrap=k:9092", "'bootsrap'"),
        ("config.accounts[0].regoin=x", "'regoin'"),
        ("exporter.resources.limits.cpus=1", "'cpus'"),
        ("config.run.clock_offset_s=1", "'run'"),
        ("secretEnv.A.secret=only", "/secretEnv/A"),
        ("pod.runAsUser=0", "/pod/runAsUser"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_helm_before_anything_is_touched(change: str, what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)):
        template(CHART / "ci" / "minimal.yaml", change)


# --- pods -------------------------------------------------------------------------------------------------------


@needs_helm
@by_scenario
def test_no_pod_may_do_more_than_it_needs(scenario: Path, rendered: Render) -> None:
    for name, pod in pods(rendered(scenario.stem)).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        [container] = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        writable = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
        # An exporter alone writes: payloads of heavy tasks, to a disk of bounded size.
        exporter = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "exporter"
        assert writable == (["/tmp"] if exporter else []), name  # noqa: S108
        sizes = [v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v]
        assert sizes == ([{"sizeLimit": "4Gi"}] if exporter else []), name


@needs_helm
@by_scenario
def test_memory_is_asked_for_as_it_is_limited_and_cpu_has_no_limit(scenario: Path, rendered: Render) -> None:
    for name, pod in pods(rendered(scenario.stem)).items():
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"], name
        assert resources["requests"].keys() == {"cpu", "memory"}, name
        assert resources["limits"].keys() == {"memory"}, name


@needs_helm
def test_probes_ask_what_they_mean_and_the_grace_is_above_the_drain(rendered: Render) -> None:
    for pod in worker_pods(rendered("minimal")).values():
        [container] = pod["spec"]["containers"]
        asked = {
            kind: container[f"{kind}Probe"]["httpGet"]["path"]
            for kind in ("startup", "liveness", "readiness")
        }
        assert asked == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
        assert container["ports"] == [{"name": "metrics", "containerPort": 9100}]
        assert container["args"][-2:] == ["--metrics-port", "9100"]
        # An exporter drains, cancels what is left, and says goodbye to Kafka, for ten seconds each client.
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 2 * exporter.DRAIN_S + 2 * 10
        assert pod["spec"]["terminationGracePeriodSeconds"] >= reading.DRAIN_S + 2 * 10


@needs_helm
def test_selectors_say_nothing_that_an_upgrade_changes(rendered: Render) -> None:
    for name, m in rendered("eight-shards").items():
        labels = m.get("spec", {}).get("selector", {}).get("matchLabels", {})
        assert not labels.keys() & {"app.kubernetes.io/version", "helm.sh/chart"}, name
        if name.startswith("Deployment/"):
            assert labels.items() <= m["spec"]["template"]["metadata"]["labels"].items()
            assert "helm.sh/chart" not in m["spec"]["template"]["metadata"]["labels"]


@needs_helm
def test_shards_spread_from_each_other_and_not_each_from_itself(rendered: Render) -> None:
    found = rendered("eight-shards")
    for n in range(1, 9):
        spread = found[f"Deployment/headgate-exporter-{n}"]["spec"]["template"]["spec"][
            "topologySpreadConstraints"
        ]
        assert {s["topologyKey"] for s in spread} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        assert all("headgate/shard" not in s["labelSelector"]["matchLabels"] for s in spread)
    assert found["PodDisruptionBudget/headgate-exporter"]["spec"]["maxUnavailable"] == 1


# --- what stands around them ------------------------------------------------------------------------------------


@needs_helm
def test_setup_runs_before_everything_and_brings_all_that_it_needs(rendered: Render) -> None:
    found = rendered("eight-shards")
    hooks = {name: m for name, m in found.items() if "helm.sh/hook" in m["metadata"].get("annotations", {})}
    assert sorted(hooks) == [
        f"{kind}/headgate-setup" for kind in ("ConfigMap", "Job", "Secret", "ServiceAccount")
    ]
    weights = {name: int(m["metadata"]["annotations"]["helm.sh/hook-weight"]) for name, m in hooks.items()}
    assert all(
        weights["Job/headgate-setup"] > w for name, w in weights.items() if name != "Job/headgate-setup"
    )
    spec = hooks["Job/headgate-setup"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["args"] == ["setup", "--config", "/etc/headgate/headgate.yaml"]
    [rule] = hooks["Job/headgate-setup"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    # What is an ordinary part of the release is not there yet at an install.
    assert spec["serviceAccountName"] == "headgate-setup"
    assert spec["volumes"] == [{"name": "config", "configMap": {"name": "headgate-setup"}}]
    assert spec["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "headgate-setup"


@needs_helm
def test_nothing_that_is_secret_stands_outside_of_a_secret(rendered: Render) -> None:
    found = rendered("minimal", "secretEnv.A_PASSWORD.value=open-sesame")
    assert found["Secret/headgate"]["stringData"] == {"A_PASSWORD": "open-sesame"}
    outside = {name: m for name, m in found.items() if not name.startswith("Secret/")}
    assert "open-sesame" not in json.dumps(outside)


@needs_helm
def test_the_network_is_closed_but_for_dns_and_the_named_peers(rendered: Render) -> None:
    found = rendered("msk-iam")
    policy = found["NetworkPolicy/headgate"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy
    everywhere = [sorted(p["port"] for p in e["ports"]) for e in policy["egress"] if "to" not in e]
    assert everywhere == [[53, 53], [443]]
    named = {e["to"][0]["ipBlock"]["cidr"]: [] for e in policy["egress"] if "to" in e}
    for e in (e for e in policy["egress"] if "to" in e):
        named[e["to"][0]["ipBlock"]["cidr"]] += [p["port"] for p in e["ports"]]
    assert named == {"169.254.170.23/32": [80], "10.0.0.0/16": [9098, 5432]}
    for name, pod in pods(found).items():
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), name
    [ingress] = rendered("eight-shards")["NetworkPolicy/headgate"]["spec"]["ingress"]
    assert ingress["ports"] == [{"protocol": "TCP", "port": "metrics"}]


@needs_helm
def test_consumers_scale_by_one_thing_only(rendered: Render) -> None:
    name = "headgate-consumer-postgres"
    for scenario, by in (
        ("minimal", "HorizontalPodAutoscaler"),
        ("sasl-scram", "ScaledObject"),
        ("polardb", None),
    ):
        found = rendered(scenario)
        there = {k for k in ("HorizontalPodAutoscaler", "ScaledObject") if f"{k}/{name}" in found}
        assert there == ({by} if by else set())
        # Whoever scales owns the number: an upgrade must not set it back.
        assert ("replicas" in found[f"Deployment/{name}"]["spec"]) == (by is None)


@needs_helm
def test_keda_asks_kafka_as_the_workers_do(rendered: Render) -> None:
    found = rendered("sasl-scram")
    [trigger] = found["ScaledObject/headgate-consumer-postgres"]["spec"]["triggers"]
    assert trigger["metadata"] == {
        "bootstrapServers": "kafka.example.internal:9094",
        "consumerGroup": landing_group(Kafka()),
        "topic": "headgate.raw",
        "lagThreshold": "1000",
        "tls": "enable",
        "sasl": "scram_sha512",
    }
    auth = found[f"TriggerAuthentication/{trigger['authenticationRef']['name']}"]["spec"]["env"]
    assert [(a["parameter"], a["name"]) for a in auth] == [
        ("username", "HEADGATE_KAFKA_USERNAME"),
        ("password", "HEADGATE_KAFKA_PASSWORD"),
    ]
    [trigger] = rendered("msk-iam")["ScaledObject/headgate-consumer-postgres"]["spec"]["triggers"]
    assert trigger["metadata"]["saslTokenProvider"] == "aws_msk_iam"
    assert trigger["metadata"]["awsRegion"] == "eu-west-1"


@needs_helm
def test_a_remote_writer_is_made_only_where_there_are_receivers_and_nothing_else_is_touched(
    rendered: Render,
) -> None:
    was = rendered("minimal")
    assert not [name for name in was if "remote-writer" in name]
    to = "config.remote_write.receivers[0]"
    becomes = rendered("minimal", f"{to}.name=a,{to}.url=http://a:9090/api/v1/write")
    changed = {name for name in was.keys() | becomes.keys() if was.get(name) != becomes.get(name)}
    name = "headgate-remote-writer"
    kinds = (
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "ServiceAccount",
    )
    assert changed == {
        *(f"{kind}/{name}" for kind in kinds), "ConfigMap/headgate", "ConfigMap/headgate-setup",
    }  # fmt: skip
    # A receiver more is taken up by the writers that run.
    two = rendered("minimal", f"{to}.name=b,{to}.url=http://b:9090/api/v1/write")
    assert worker_pods(two) == worker_pods(becomes)


@needs_helm
def test_a_remote_writer_has_its_pods_name_and_its_receivers_are_let_out_for_it_alone(
    rendered: Render,
) -> None:
    found = rendered("prometheus")
    pod = found["Deployment/headgate-remote-writer"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert container["args"][:3] == ["remote-write", "--name", "$(POD_NAME)"]
    assert {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in container["env"]
    secret = {"secretKeyRef": {"name": "prometheus", "key": "password"}}
    assert {"name": "PROMETHEUS_PASSWORD", "valueFrom": secret} in container["env"]
    policy = found["NetworkPolicy/headgate-remote-writer"]["spec"]
    let_out = [name for name, p in pods(found).items() if selects(policy["podSelector"], p)]
    assert let_out == ["Deployment/headgate-remote-writer"]
    [egress] = policy["egress"]
    assert [p["port"] for p in egress["ports"]] == [9090]
    assert egress["to"] == yaml.safe_load((CHART / "ci" / "prometheus.yaml").read_text())["networkPolicy"]["remoteWrite"]["to"]  # fmt: skip


@needs_helm
def test_lag_of_each_receiver_is_a_trigger_of_its_own(rendered: Render) -> None:
    triggers = rendered("prometheus")["ScaledObject/headgate-remote-writer"]["spec"]["triggers"]
    assert [t["metadata"]["consumerGroup"] for t in triggers] == [
        remote_write_group(Kafka(), f"prometheus-{n}") for n in (1, 2, 3)
    ]
    assert {t["metadata"]["topic"] for t in triggers} == {"headgate.raw"}


@needs_helm
def test_the_page_is_the_coordinators_and_open_to_those_who_are_named(rendered: Render) -> None:
    found = rendered("prometheus")
    policy = found["NetworkPolicy/headgate-page"]["spec"]
    assert [name for name, p in pods(found).items() if selects(policy["podSelector"], p)] == [
        "Deployment/headgate-coordinator"
    ]
    [ingress] = policy["ingress"]
    assert ingress["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}
    ]
    assert "NetworkPolicy/headgate-page" not in rendered("minimal")
    service = found["Service/headgate-coordinator"]["spec"]
    assert service.get("type", "ClusterIP") == "ClusterIP"
    assert [(p["name"], p["port"], p["targetPort"]) for p in service["ports"]] == [
        ("metrics", 9100, "metrics")
    ]


def selects(selector: Manifest, pod: Manifest) -> bool:
    labels: dict[str, str] = pod["metadata"]["labels"]
    return bool(selector["matchLabels"].items() <= labels.items())


# --- rules and dashboards ---------------------------------------------------------------------------------------

RULES = sorted(CHART.glob("files/rules/*.yml"))
DASHBOARDS = sorted(CHART.glob("files/dashboards/*.json"))


@needs_helm
def test_each_file_of_rules_is_a_prometheusrule_that_says_the_same(rendered: Render) -> None:
    found = rendered("prometheus")
    made = {n: m for n, m in found.items() if n.startswith("PrometheusRule/")}
    assert made.keys() == {f"PrometheusRule/headgate-{path.stem}" for path in RULES}
    for path in RULES:
        said = made[f"PrometheusRule/headgate-{path.stem}"]
        assert said["metadata"]["labels"]["release"] == "prometheus"
        written = yaml.safe_load(path.read_text())
        for rule in (r for group in written["groups"] for r in group["rules"]):
            if url := rule.get("annotations", {}).get("runbook_url"):
                page = url.removeprefix("docs/runbooks/")
                assert page != url
                rule["annotations"]["runbook_url"] = f"https://wiki.example.com/headgate/runbooks/{page}"
        assert said["spec"] == written


@needs_helm
def test_aggregates_are_recorded_only_where_samples_are_written_in_the_names_that_they_ask_for(
    rendered: Render,
) -> None:
    def recorded(*sets: str) -> set[str]:
        found = rendered(*sets, "prometheusRule.enabled=true")
        return {n for n in found if n.startswith("PrometheusRule/headgate-recording")}

    every = {f"PrometheusRule/headgate-{p.stem}" for p in RULES if p.stem.startswith("recording")}
    assert recorded("prometheus") == every
    assert recorded("minimal") == recorded("prometheus", "config.remote_write.names=headgate") == set()


@needs_helm
def test_each_dashboard_is_a_configmap_that_grafanas_sidecar_finds(rendered: Render) -> None:
    found = rendered("prometheus")
    made = {n: m for n, m in found.items() if n.startswith("ConfigMap/headgate-dashboard-")}
    assert made.keys() == {f"ConfigMap/headgate-dashboard-{path.stem}" for path in DASHBOARDS}
    for path in DASHBOARDS:
        one = made[f"ConfigMap/headgate-dashboard-{path.stem}"]
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "Headgate"}
        [(name, text)] = one["data"].items()
        assert name == f"headgate-{path.name}"
        assert json.loads(text) == json.loads(path.read_text())
        # etcd takes no object above 1.5 MiB, Kubernetes no ConfigMap above 1 MiB.
        assert len(text.encode()) < 2**20


@needs_helm
def test_a_release_with_everything_in_it_fits_into_the_secret_that_helm_keeps_it_in() -> None:
    # The chart's files in base64 and all that was rendered, compressed, in base64 again: at most 1 MiB.
    chart = b"".join(base64.b64encode(p.read_bytes()) for p in sorted(CHART.rglob("*")) if p.is_file())
    everything = chart + template(CHART / "ci" / "prometheus.yaml").encode()
    assert len(base64.b64encode(gzip.compress(everything))) < 0.8 * 2**20


@needs_helm
def test_roles_are_annotations_of_the_parts_own_accounts(rendered: Render) -> None:
    found = rendered("msk-iam")
    for part in ("coordinator", "exporter", "consumer-postgres", "setup"):
        role = found[f"ServiceAccount/headgate-{part}"]["metadata"]["annotations"][
            "eks.amazonaws.com/role-arn"
        ]
        assert role == f"arn:aws:iam::111111111111:role/headgate-{part.removesuffix('-postgres')}"
    theirs = rendered("existing-secrets")
    assert [name for name in theirs if name.startswith(("ServiceAccount/", "Secret/"))] == []
    assert {p["spec"]["serviceAccountName"] for p in pods(theirs).values()} == {
        f"metrics-{part}" for part in ("coordinator", "exporter", "consumer", "setup")
    }


# --- values, schema, README -------------------------------------------------------------------------------------


def test_the_schema_has_the_configurations_keys_as_they_are_now() -> None:
    assert (CHART / "values.schema.json").read_text() == schema_text(), MADE
    assert set(Config.model_fields) - {"run"} | {"defaults"} == SCHEMA["$defs"]["Config"]["properties"].keys()


def test_the_readme_is_made_of_the_values_as_they_are_now() -> None:
    assert (CHART / "README.md").read_text() == readme(), MADE


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    ref = schema.get("$ref")
    return SCHEMA["$defs"][ref.rpartition("/")[2]] if ref else schema


def test_every_value_is_in_the_schema_and_every_key_of_the_schema_is_a_value() -> None:
    def compare(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        schema = resolved(schema)
        known = schema.get("properties", {})
        if not known:
            return  # a mapping whose keys are the user's
        assert values.keys() <= known.keys(), path
        # headgate.yaml's keys are described, with their defaults, in docs/configuration.md; `global` is helm's.
        if not path.startswith(".config") and not path.endswith((".requests", ".limits", ".affinity")):
            assert known.keys() - {"global"} == values.keys(), path
        for key, value in values.items():
            if isinstance(value, dict):
                compare(value, known[key], f"{path}.{key}")

    compare(VALUES, SCHEMA, "")


def test_the_schema_refuses_unknown_keys_at_every_level() -> None:
    def look(schema: Any, path: str) -> None:
        if isinstance(schema, list):
            for each in schema:
                look(each, path)
        elif isinstance(schema, dict):
            if "properties" in schema:
                assert schema["additionalProperties"] is False, path
            for key, each in schema.items():
                look(each, f"{path}/{key}")

    look(SCHEMA, "#")


def test_every_value_has_a_comment_that_states_its_consequence() -> None:
    found = list(values_of(VALUES_TEXT))
    described = {v.path: v.comment for v in found if v.comment}
    assert [path for path, comment in described.items() if len(comment) < 20] == []
    silent = []
    for value in found:
        leaf = not any(v.path[:-1] == value.path for v in found)
        # A key is described by its own comment, or by its parent's, where that describes the parent as one thing.
        above = max((p for p in described if value.path[: len(p)] == p), key=len, default=())
        whole = bool(above) and not any(len(p) > len(above) and p[: len(above)] == above for p in described)
        silent += [".".join(value.path)] if leaf and not whole else []
    assert silent == []


def test_the_chart_is_of_the_packages_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    pyproject = (CHART.parents[1] / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in pyproject


def test_the_archives_rule_makes_it_colder_and_never_shorter() -> None:
    rules = json.loads((CHART / "files" / "archive-lifecycle.json").read_text())["Rules"]
    assert {t["Days"] for rule in rules for t in rule["Transitions"]} == {63}
    # What replays read has to answer at once; what the archive holds is never deleted.
    assert {t["StorageClass"] for rule in rules for t in rule["Transitions"]} <= {"GLACIER_IR", "STANDARD_IA"}
    assert not any("Expiration" in key for rule in rules for key in rule)
    # Listings and locks beside the archive are read all the time.
    assert {rule["Filter"]["And"]["Prefix"] for rule in rules} == {"v1/"}


# --- a user for each part ---------------------------------------------------------------------------------------


@needs_helm
def test_a_part_gets_its_own_users_and_no_others(rendered: Render) -> None:
    found = rendered("least-privilege")
    secrets: dict[str, set[str]] = {}
    for pod in pods(found).values():
        [container] = pod["spec"]["containers"]
        given = {one["name"]: one.get("valueFrom", {}).get("secretKeyRef") for one in container["env"]}
        env = {name: secret for name, secret in given.items() if secret}
        part = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        secrets.setdefault(part, set()).update(ref["name"] for ref in env.values())
        assert env.keys() >= {"HEADGATE_KAFKA_USERNAME", "HEADGATE_KAFKA_PASSWORD"}, part
        assert {"name": "secrets", "mountPath": "/etc/headgate-secrets", "readOnly": True} in container[
            "volumeMounts"
        ]
    # Those who never speak to PostgreSQL read the file all the same, and its password is a made-up one.
    nobody = {"headgate-nobody"}
    assert secrets == {
        "coordinator": {"headgate-coordinator"},
        "exporter": {"headgate-exporter"} | nobody,
        "consumer-postgres": {"headgate-consumer"},
        "remote-writer": {"headgate-remote-writer"} | nobody,
        "setup": {"headgate-setup"},
    }


@needs_helm
@by_scenario
def test_every_pod_is_behind_a_policy_that_denies_by_default(scenario: Path, rendered: Render) -> None:
    found = rendered(scenario.stem)
    policies = [m["spec"] for name, m in found.items() if name.startswith("NetworkPolicy/")]
    for name, pod in pods(found).items():
        labels = pod["metadata"]["labels"].items()
        over = [p for p in policies if p["podSelector"].get("matchLabels", {}).items() <= labels]
        denied = {kind for p in over for kind in p["policyTypes"]}
        assert denied == {"Ingress", "Egress"}, name
        # None of them lets in everybody: an empty rule, or one of ports alone, would.
        assert all(rule.get("from") for p in over for rule in p.get("ingress", ())), name
