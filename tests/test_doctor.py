"""The doctor's verdicts: on what a real API server, scheduler and controllers said (tests/golden/doctor, recorded by tests/k8s), and by hand.

Recorded anew with `HEADGATE_RECORD=tests/golden/doctor make test-k8s`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from ingest.errors import Rejected, Transient
from workers.cli import main
from workers.doctor import render
from workers.pods.cluster import Cluster, throttled
from workers.pods.diagnosis import Report, diagnose
from workers.pods.placing import NOTHING, Room, lower, nodes_more, places, reasons, requests
from workers.pods.seen import MIB, Seen, Usage, Verdict, amount, amount_text
from workers.servers import free_ports

RECORDED = sorted((Path(__file__).parent / "golden" / "doctor").glob("*.json"))
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
Object = dict[str, Any]


def seen_of(plain: Mapping[str, Any]) -> Seen:
    usage = {(pod, container): Usage(**known) for pod, container, known in plain["usage"]}
    return Seen(**{**plain, "usage": usage})


@pytest.mark.parametrize("case", RECORDED, ids=lambda p: p.stem)
def test_what_a_real_cluster_said_has_the_verdicts_that_it_had(case: Path) -> None:
    recorded = json.loads(case.read_text())
    report = diagnose(seen_of(recorded["seen"]), datetime.fromisoformat(recorded["now"]))
    assert report.verdicts == tuple(Verdict(**v) for v in recorded["verdicts"])


def test_something_is_recorded() -> None:
    assert len(RECORDED) >= 10


# --- by hand: what is not recorded -----------------------------------------------------------------


def pod(name: str = "headgate-exporter-1-abc", part: str = "exporter", **status: Any) -> Object:
    resources = {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}}
    return {
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/component": part, "headgate/shard": "exporter-1"},
            "creationTimestamp": (NOW - timedelta(hours=1)).isoformat(),
        },
        "spec": {"containers": [{"name": "headgate", "resources": resources}]},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}], **status},
    }


def unready(**container: Any) -> Object:
    status = {"name": "headgate", "image": "headgate:1", "restartCount": 2, "state": {}, **container}
    return pod(conditions=[{"type": "Ready", "status": "False"}], containerStatuses=[status])


def verdicts(one: Object, **around: Any) -> tuple[Verdict, ...]:
    return diagnose(Seen(pods=[one], **around), NOW).verdicts


CADVISOR = """\
# HELP container_cpu_cfs_periods_total Number of elapsed enforcement period intervals.
# TYPE container_cpu_cfs_periods_total counter
container_cpu_cfs_periods_total{container="headgate",namespace="metrics",pod="a"} 2000 1764000000000
container_cpu_cfs_periods_total{container="headgate",namespace="other",pod="a"} 10 1764000000000
# TYPE container_cpu_cfs_throttled_periods_total counter
container_cpu_cfs_throttled_periods_total{container="headgate",namespace="metrics",pod="a"} 500 1764000000000
# TYPE container_memory_rss gauge
container_memory_rss{container="headgate",namespace="metrics",pod="a"} 1
"""


def test_cadvisors_text_gives_the_share_of_throttled_periods_of_the_namespace() -> None:
    assert throttled(CADVISOR, "metrics") == {("a", "headgate"): 0.25}


def test_a_cpu_limit_that_throttles_is_a_verdict_and_one_that_hardly_does_is_none() -> None:
    one = pod()
    one["spec"]["containers"][0]["resources"]["limits"]["cpu"] = "500m"
    key = (one["metadata"]["name"], "headgate")
    (verdict,) = verdicts(one, usage={key: Usage(throttled_share=0.25)})
    assert verdict.evidence == "throttled in 25% of the periods since it started"
    assert verdict.remedy.startswith("remove exporter.resources.limits.cpu")
    assert "raise it to 1 " in verdict.remedy
    assert verdicts(one, usage={key: Usage(throttled_share=0.01)}) == ()


def test_after_an_oom_the_request_to_set_is_above_limit_and_working_set() -> None:
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": NOW.isoformat()}}
    one = unready(lastState=killed, state={"running": {}})
    key = (one["metadata"]["name"], "headgate")
    (verdict,) = verdicts(one, usage={key: Usage(working_set_bytes=500 * MIB)})
    assert verdict.evidence == "OOMKilled, 2 restarts, limit 512Mi, working set now: 500Mi"
    assert (
        "exporter.resources.requests.memory and exporter.resources.limits.memory to 768Mi" in verdict.remedy
    )


def test_an_oom_of_the_day_before_yesterday_is_no_news() -> None:
    before = (NOW - timedelta(days=2)).isoformat()
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": before}}
    assert (
        verdicts(pod(containerStatuses=[{"name": "headgate", "lastState": killed, "state": {"running": {}}}]))
        == ()
    )


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("manifest for headgate:9 not found: manifest unknown", "image.tag"),
        ("pull access denied, repository does not exist or may require authorization", "image.pullSecrets"),
        ("dial tcp: lookup registry.example: no such host", "mirror the image"),
    ],
)
def test_an_image_that_is_not_pulled_has_the_remedy_for_its_reason(message: str, remedy: str) -> None:
    (verdict,) = verdicts(unready(state={"waiting": {"reason": "ImagePullBackOff", "message": message}}))
    assert remedy in verdict.remedy


def test_a_secret_that_is_missing_is_named() -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "kafka" not found'}
    (verdict,) = verdicts(unready(state={"waiting": waiting}))
    assert 'secret "kafka" not found' in verdict.evidence


def test_a_young_pod_is_starting_and_not_wrong() -> None:
    one = unready(state={"running": {}})
    one["status"]["startTime"] = (NOW - timedelta(seconds=30)).isoformat()
    assert diagnose(Seen(pods=[one]), NOW) == Report((), (), (one["metadata"]["name"],), ())


def test_a_pod_that_does_not_go_is_a_verdict_when_it_is_overdue() -> None:
    one = pod()
    one["spec"]["nodeName"] = "node-1"
    one["metadata"]["deletionTimestamp"] = (NOW - timedelta(seconds=30)).isoformat()
    assert diagnose(Seen(pods=[one]), NOW) == Report((), (), (), ())
    one["metadata"]["deletionTimestamp"] = (NOW - timedelta(minutes=10)).isoformat()
    (verdict,) = verdicts(one)
    assert "600 s ago, on node-1" in verdict.evidence
    assert "kubectl delete node node-1" in verdict.remedy


def test_a_deployment_that_somebody_stopped_is_a_verdict() -> None:
    stopped = {"metadata": {"name": "d"}, "spec": {"replicas": 0}}
    (verdict,) = diagnose(Seen(deployments=[stopped]), NOW).verdicts
    assert verdict.remedy == "kubectl scale --replicas=1 deployment d"


SHARD = {"shard": "exporter-1", "alive": True, "slots": [], "assigned": []}


def test_a_ready_shard_without_slots_is_found_by_the_coordinators_page() -> None:
    (verdict,) = verdicts(pod(), shards={"slots": 64, "shards": [SHARD]})
    assert verdict.what == "it owns no slots"
    assert verdicts(pod(), shards={"slots": 64, "shards": [{**SHARD, "slots": [1]}]}) == ()


def test_more_shards_than_slots_and_a_coordinator_that_is_not_ready_have_remedies_of_their_own() -> None:
    two = [pod(), pod("headgate-exporter-2-abc")]
    told = diagnose(Seen(pods=two, shards={"slots": 1, "shards": [SHARD]}), NOW).verdicts
    assert "shards to 1, or config.slots to 2" in told[0].remedy
    one = unready(state={"running": {}})
    boss = pod("c", "coordinator", conditions=[{"type": "Ready", "status": "False"}])
    found = {v.pod: v for v in diagnose(Seen(pods=[one, boss]), NOW).verdicts}
    assert found["c"].what == "it has announced no plan"
    assert found[one["metadata"]["name"]].remedy.startswith("first the coordinator")


def refused(message: str, **seen: Any) -> Verdict:
    conditions = [{"type": "ReplicaFailure", "status": "True", "message": message}]
    labels = {"app.kubernetes.io/component": "consumer-postgres"}
    deployment = {
        "metadata": {"name": "d", "labels": labels},
        "status": {"conditions": conditions, "unavailableReplicas": 2},
    }
    (verdict,) = diagnose(Seen(deployments=[deployment], **seen), NOW).verdicts
    return verdict


def test_a_quota_has_the_number_to_raise_it_to_and_the_request_that_fits() -> None:
    verdict = refused(
        'pods "d-1" is forbidden: exceeded quota: team, requested: limits.memory=384Mi,requests.cpu=250m, '
        "used: limits.memory=512Mi,requests.cpu=1, limited: limits.memory=1Gi,requests.cpu=1"
    )
    assert verdict.what == "its pod is not made: the quota team is used up"
    assert "raise limits.memory to 1280Mi, requests.cpu to 1500m in the quota team" in verdict.remedy
    assert "lower sinks.postgres.resources.limits.memory to 256Mi" in verdict.remedy


def test_a_quota_on_cpu_limits_which_the_chart_does_not_set() -> None:
    verdict = refused('pods "d-1" is forbidden: failed quota: team: must specify limits.cpu for: headgate')
    assert verdict.what == "its pod is not made: the quota team takes only pods that say limits.cpu"
    assert verdict.remedy.startswith("set sinks.postgres.resources.limits.cpu")


def test_what_is_unseen_is_said_and_verdicts_in_common_are_said_once() -> None:
    same = [Verdict(p, "w", f"e of {p}\nmore", "r") for p in ("a", "b")]
    text = "\n".join(render(Report(tuple(same), ("c",), (), ("nodes: HTTP 403: forbidden",))))
    assert text.splitlines() == [
        "a, b: w",
        "  evidence  e of a",
        "            more",
        "  remedy    r",
        "",
        "fine: c",
        "not looked at: nodes: HTTP 403: forbidden",
    ]


# --- arithmetic -----------------------------------------------------------------------------------------------


def test_the_schedulers_reasons_are_counted_without_its_words_on_preemption() -> None:
    message = (
        "0/5 nodes are available: 2 Insufficient cpu, 3 node(s) didn't match Pod's node affinity/selector. "
        "preemption: 0/5 nodes are available: 5 Preemption is not helpful for scheduling."
    )
    assert reasons(message) == {"Insufficient cpu": 2, "node(s) didn't match Pod's node affinity/selector": 3}
    unbound = "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"
    assert list(reasons(unbound).values()) == [0]


@pytest.mark.parametrize(
    ("resource", "text", "value", "back"),
    [("cpu", "250m", 250, "250m"), ("cpu", 2, 2000, "2"), ("cpu", "1.5", 1500, "1500m"),
     ("memory", "2Gi", 2 << 30, "2Gi"), ("memory", "384Mi", 384 * MIB, "384Mi"), ("memory", "1G", 10**9, "953Mi"),
     ("requests.storage", "1Ki", 1024, "0Mi"), ("pods", "3", 3000, "3")],
)  # fmt: skip
def test_quantities_are_read_and_written(resource: str, text: object, value: int, back: str) -> None:
    assert amount(resource, text) == value
    assert amount_text(resource, value) == back


def test_requests_are_containers_together_or_the_greatest_init_container_and_overhead() -> None:
    def container(cpu: str, memory: str, **more: str) -> Object:
        return {"name": cpu, "resources": {"requests": {"cpu": cpu, "memory": memory}}, **more}

    spec = {
        "containers": [container("100m", "1Gi"), container("200m", "1Gi")],
        "initContainers": [container("1", "64Mi"), container("50m", "64Mi", restartPolicy="Always")],
        "overhead": {"cpu": "10m", "memory": "1Mi"},
    }
    assert requests({"spec": spec}) == Room(1010, (2048 + 64 + 1) * MIB, 1)


def expression(key: str, operator: str, *values: str) -> Object:
    return {"key": key, "operator": operator, "values": list(values)}


@pytest.mark.parametrize(
    ("asked", "met"),
    [
        (expression("zone", "In", "a", "b"), True),
        (expression("zone", "NotIn", "a"), False),
        (expression("gpu", "Exists"), False),
        (expression("gpu", "DoesNotExist"), True),
        (expression("cores", "Gt", "4"), True),
        (expression("cores", "Lt", "8"), False),
    ],
)
def test_node_affinity_is_the_schedulers(asked: Object, met: bool) -> None:
    node = {"metadata": {"name": "n", "labels": {"zone": "a", "cores": "8"}}, "spec": {}, "status": {}}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [asked]}]}
    one = pod()
    one["spec"]["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    assert places(one, [node], [])[0].open == met


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ({"operator": "Exists"}, True),
        ({"key": "dedicated", "operator": "Exists"}, True),
        ({"key": "dedicated", "value": "db"}, True),
        ({"key": "dedicated", "value": "db", "effect": "NoExecute"}, False),
        ({"key": "dedicated", "value": "web"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_tolerations_are_the_schedulers(toleration: Object, tolerated: bool) -> None:
    taint = {"key": "dedicated", "value": "db", "effect": "NoSchedule"}
    node = {"metadata": {"name": "n"}, "spec": {"taints": [taint]}, "status": {}}
    one = pod()
    one["spec"]["tolerations"] = [toleration]
    assert places(one, [node], [])[0].open == tolerated


rooms = st.builds(Room, st.integers(0, 4000), st.integers(0, 4096).map(lambda m: m * MIB), st.integers(0, 20))
asks = st.builds(
    Room, st.integers(1, 300).map(lambda c: c * 10), st.integers(1, 3000).map(lambda m: m * MIB), st.just(1)
)


@given(asks, st.integers(1, 12), st.lists(rooms, min_size=1, max_size=6))
def test_the_lower_request_fits_all_pods_and_the_next_step_up_does_not(
    ask: Room, total: int, room: list[Room]
) -> None:
    assume(sum(r.holds(ask) for r in room) < total)
    less = lower(ask, total, room, ["cpu_m"])
    if less is None:
        assert sum(r.holds(Room(10, ask.memory_bytes)) for r in room) < total or ask.cpu_m == 10
        return
    assert less.memory_bytes == ask.memory_bytes
    assert sum(r.holds(less) for r in room) >= total
    assert sum(r.holds(Room(less.cpu_m + 10, less.memory_bytes)) for r in room) < total


@given(st.lists(asks, max_size=12), st.lists(rooms, max_size=4), rooms)
def test_so_many_nodes_more_hold_what_waits_or_one_of_it_is_too_great(
    waiting: list[Room], free: list[Room], size: Room
) -> None:
    more = nodes_more(waiting, free, size)
    if more is None:
        assert not all(size.holds(w) for w in waiting)
        return
    have = sum([*free, *[size] * more], NOTHING)
    wanted = sum(waiting, NOTHING)
    assert have.holds(wanted) or not wanted.pods
    assert more <= len(waiting)


# --- the API, where it does not say 200 ------------------------------------------------------------------------


class Api(BaseHTTPRequestHandler):
    """Two pages of /pods; everything else is forbidden, or broken."""

    def do_GET(self) -> None:
        status, body = 403, {"message": "nodes is forbidden: User cannot list"}
        if self.path.startswith("/pods"):
            last = "continue=more" in self.path
            status, body = (
                200,
                {"items": [{"n": int(last)}], "metadata": {} if last else {"continue": "more"}},
            )
        elif self.path.startswith("/broken"):
            status, body = 503, {"message": "etcd is away"}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "c", "user": {"token": "t"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c", "namespace": "metrics"}}],
        }  # fmt: skip
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        with Cluster() as opened:
            yield opened
        server.shutdown()
        thread.join()


def test_lists_are_read_to_their_last_page_and_refusals_are_errors_with_the_apis_words(
    cluster: Cluster,
) -> None:
    assert cluster.namespace == "metrics"
    assert cluster.items("/pods") == [{"n": 0}, {"n": 1}]
    with pytest.raises(Rejected, match="HTTP 403: nodes is forbidden"):
        cluster.items("/nodes")
    with pytest.raises(Transient, match="HTTP 503: etcd is away"):
        cluster.get("/broken")


def test_an_api_that_is_not_reached_is_transient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    config = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "c", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        "current-context": "c",
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with Cluster() as closed, pytest.raises(Transient, match=f"127.0.0.1:{port}"):
        closed.get("/version")


def test_without_a_kubeconfig_the_command_says_so_and_ends_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    assert main(["doctor"]) == 2
    assert "set KUBECONFIG" in capsys.readouterr().err
