"""What YACE calls series: cases, and what the real `yace` says of them on /metrics against the simulated AWS.

`python -m tests.yace_names` takes the facts anew (`yace` must be on the PATH) and writes tests/golden/yace/names.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ingest.resources import Resource
from shard_config.known import shipped_services
from workers import simulator
from workers.servers import LOOPBACK, free_ports
from workers.simulated import resources as simulated
from workers.simulated import server, tagging
from workers.world import Answer, Metric, Question, Truth

GOLDEN = Path(__file__).parent / "golden" / "yace" / "names.json"
ACCOUNT, REGION = "100000000001", "eu-west-1"
TAGS = {
    "Name": "a resource",
    "Team": "payments",
    "cost-centre": "42",
    "aws:stack/name": "s",
    "50%": "half",
    "CostCentre2Owner": "x",
    "1st": "begins with a digit",
    "équipe": "not ASCII",
    "a+b": "a plus",
    "empty": "",
    "quote": 'a "quoted" \\ and\nbroken line, é',
}
EXPORTED = [
    "Team",
    "cost-centre",
    "aws:stack/name",
    "50%",
    "CostCentre2Owner",
    "1st",
    "équipe",
    "quote",
    "Absent",
]
CUSTOM_TAGS = {"env": "prod", "Data-Centre": "dub 1", "2nd": "begins with a digit"}
CUSTOM_JOB = "a job of mine"
RICH = ("AWS/EC2", "AWS/ApplicationELB", "My/App")
"""Namespaces whose resources have all of TAGS, and whose series have exported and custom tags."""
Dimensions = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """One series. `kind` is YACE's job; `yace` are the labels on its /metrics, without snake case and with; None where it has no such line."""

    kind: str
    namespace: str
    metric: str
    stat: str
    dimensions: Dimensions
    yace: dict[str, str] | None = None
    yace_snake: dict[str, str] | None = None

    @property
    def key(self) -> tuple[str, str, Dimensions, str]:
        return self.namespace, self.metric, self.dimensions, self.stat


_ODD_METRICS = (
    "CPUUtilization", "cpu_usage_idle", "CPU Utilization", "Used%", "a.b-c:d=e", "HTTPCode_ELB_5XX_Count", "p99Latency", "IPv4Count",
    "a@b<c>d(e)", "x,y\\z", "“quoted", "5XXError", "JVM.HeapMB2Used", "_leading", "a__b", "plus+sharp#", "équipeÉtat", 'quo"te', "a&b;c",
)  # fmt: skip
_NAMESPACES = (
    "My/App", "AWS-like", "aws.own", "/aws/sagemaker/TrainingJobs", "Glue", "Foo/Bar", "ECS/ContainerInsights", "LambdaInsights", "My App 2Go",
    "Team+One",
)  # fmt: skip
_REPEATING = {
    "Glue": ("glue.driver.aggregate.bytesRead", "glueDriver"),
    "Foo/Bar": ("fooThing", "foo_bar_thing", "barThing", "FooBar", "foobar.x", "Bar"),
    "/aws/sagemaker/TrainingJobs": ("CPUUtilization", "sagemakerThing", "TrainingJobsRun"),
    "LambdaInsights": ("lambdainsights_total", "LambdaInsightsTotal"),
}
_ODD_DIMENSIONS: tuple[Dimensions, ...] = (
    (),
    (("Cluster Name", "x"),),
    (("a.b", "1"), ("cost-centre", "2"), ("path", "/")),
    (("1st", "digit"), ("InstanceId", "i-1")),
    (("Used%", "1"), ("équipe", "2")),
    (("InstanceID2Go", "v"), ("exporter", 'a "quoted" \\ value')),
    (("name", "a name"), ("region", "a region")),
)
_BESIDE: Mapping[str, Dimensions] = {
    "AWS/S3": (("StorageType", "StandardStorage"),),
    "AWS/Kafka": (("Broker ID", "1"),),
}


def _arn(namespace: str, name: str) -> str:
    template = simulated._ARNS[namespace][1]
    return template.format(region=REGION, account=ACCOUNT, name=name, uuid="0123456789abcdef")


def _elb(name: str) -> str:
    return f"arn:aws:elasticloadbalancing:{REGION}:{ACCOUNT}:{name}"


def _name(namespace: str) -> str:
    return {"AWS/ApplicationELB": "app/a/1234", "AWS/NetworkELB": "net/a/1234"}.get(namespace, "one")


def resources() -> list[Resource]:
    """Each namespace's, with dimensions as YACE associates them."""
    found = []
    for profile in shipped_services().values():
        dimension = simulated._ARNS[profile.namespace][0]
        name = _name(profile.namespace)
        tags = TAGS if profile.namespace in RICH else {"Team": "payments"}
        found.append(Resource(_arn(profile.namespace, name), tags, ((dimension, name),)))
    ecs = f"arn:aws:ecs:{REGION}:{ACCOUNT}"
    found += [
        Resource(_elb("targetgroup/t/5678"), {"Team": "groups"}, (("TargetGroup", "targetgroup/t/5678"),)),
        Resource(f"{ecs}:service/one/web", {"Team": "web"}, (("ClusterName", "one"), ("ServiceName", "web"))),
        Resource(
            f"arn:aws:rds:{REGION}:{ACCOUNT}:cluster:aurora",
            {"Team": "aurora"},
            (("DBClusterIdentifier", "aurora"),),
        ),
    ]
    return sorted(found, key=lambda r: r.arn)


def is_of(namespace: str, arn: str) -> bool:
    """Whether YACE looks among such ARNs for the resources of a namespace."""
    types = next(
        p.resources.types for p in shipped_services().values() if p.namespace == namespace and p.resources
    )
    return any(tagging._is_of(arn, kind) for kind in types)


def cases() -> list[Case]:
    """All of our services, with every metric and statistic; dimensions of sub-resources; and names of users' own."""
    found: list[Case] = []
    for profile in shipped_services().values():
        assert profile.metrics != "all"
        kind = "custom" if profile.namespace == "AWS/ApiGateway" else "discovery"
        dimension = simulated._ARNS[profile.namespace][0]
        whole = tuple(sorted(((dimension, _name(profile.namespace)), *_BESIDE.get(profile.namespace, ()))))
        for metric in profile.metrics:
            found += [Case(kind, profile.namespace, metric.name, stat, whole) for stat in metric.statistics]
        first = profile.metrics[0]
        sets: list[Dimensions] = [(), ((dimension, "never-tagged"),), (("Unknown Dimension", "x"),)]
        of_parts: dict[str, list[Dimensions]] = {
            "AWS/ApplicationELB": [(("LoadBalancer", "app/a/1234"), ("TargetGroup", "targetgroup/t/5678"))],
            "AWS/NetworkELB": [
                (("AvailabilityZone", "eu-west-1a"), ("LoadBalancer", "net/a/1234"), ("TargetGroup", "targetgroup/t/5678")),
                (("LoadBalancer", "net/a/1234"), ("TargetGroup", "targetgroup/other/1")),
            ],
            "AWS/ECS": [
                (("ClusterName", "one"), ("ServiceName", "web")),
                (("ClusterName", "one"), ("ServiceName", "never-tagged")),
            ],
            "AWS/RDS": [
                (("DBClusterIdentifier", "aurora"), ("Role", "WRITER")),
                (("DBClusterIdentifier", "aurora"), ("DBInstanceIdentifier", "one")),
            ],
            "ContainerInsights": [(("ClusterName", "one"), ("Namespace", "kube-system"), ("PodName", "dns"))],
        }  # fmt: skip
        sets += of_parts.get(profile.namespace, [])
        found += [Case(kind, profile.namespace, first.name, first.statistics[0], s) for s in sets]
    for stat in ("SampleCount", "p99.9", "p50", "IQM", "tm90", "Minimum"):
        found.append(Case("discovery", "AWS/EC2", "CPUUtilization", stat, (("InstanceId", "one"),)))
    for namespace in _NAMESPACES:
        metrics = (
            *(_ODD_METRICS if namespace == "My/App" else _ODD_METRICS[:2]),
            *_REPEATING.get(namespace, ()),
        )
        found += [Case("custom", namespace, metric, "p99.9", ()) for metric in metrics]
    found += [Case("custom", "My/App", "Dims", "Sum", dimensions) for dimensions in _ODD_DIMENSIONS]
    return list(
        {
            case.key: case for case in (replace(c, dimensions=tuple(sorted(c.dimensions))) for c in found)
        }.values()
    )


class Said(Truth):
    """A truth of these cases: the value of each is its index."""

    ages = False
    seed = 1
    accounts = (ACCOUNT,)
    regions = (REGION,)

    def __init__(self, known: Sequence[Case]) -> None:
        self._index = {case.key: i for i, case in enumerate(known)}
        named = {(c.namespace, c.metric, c.dimensions) for c in known}
        self._metrics = [Metric(n, m, d, "None") for n, m, d in sorted(named)]

    def metrics(self, account: str, region: str) -> Sequence[Metric]:
        return self._metrics

    def listed(self, account: str, region: str, asked_at_s: int, recently_active: bool) -> Sequence[Metric]:
        return self._metrics

    def answers(
        self,
        account: str,
        region: str,
        questions: Sequence[Question],
        start_s: int,
        end_s: int,
        asked_at_s: int,
    ) -> list[Answer]:
        at_s = -(-start_s // 60) * 60
        indices = [
            self._index.get((q.namespace, q.metric, tuple(sorted(q.dimensions)), q.stat)) for q in questions
        ]
        return [([], []) if i is None else ([at_s], [float(i)]) for i in indices]


def _yaml(known: Sequence[Case]) -> str:
    """YACE's configuration: a job for each namespace, which asks for each metric's statistics."""
    jobs: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
    for case in known:
        of = jobs.setdefault((case.kind, case.namespace), {})
        of.setdefault(case.metric, {})[case.stat] = None
    common = {
        "regions": [REGION],
        "roles": [{"roleArn": f"arn:aws:iam::{ACCOUNT}:role/yace"}],
    }
    rich = {"customTags": [{"key": key, "value": value} for key, value in CUSTOM_TAGS.items()]}
    written: dict[str, list[dict[str, Any]]] = {"discovery": [], "custom": []}
    for (kind, namespace), metrics in jobs.items():
        asked = [{"name": name, "statistics": list(stats)} for name, stats in metrics.items()]
        which = (
            {"type": namespace, "includeContextOnInfoMetrics": True}
            if kind == "discovery"
            else {"name": CUSTOM_JOB, "namespace": namespace}
        )
        written[kind].append(common | which | (rich if namespace in RICH else {}) | {"metrics": asked})
    exported = {job["type"]: EXPORTED for job in written["discovery"] if job["type"] in RICH}
    return yaml.safe_dump(
        {
            "apiVersion": "v1alpha1",
            "discovery": {"exportedTagsOnMetrics": exported, "jobs": written["discovery"]},
            "customNamespace": written["custom"],
        }
    )


Labels = dict[str, str]


async def taken(program: str, known: Sequence[Case], *flags: str) -> tuple[list[Labels | None], list[Labels]]:
    """Of each case, and of each info metric, the labels on the /metrics of a YACE that runs with these flags."""
    tagged = [simulated.Resource(r.arn, r.tags) for r in resources()]
    instead = patch.object(server, "resources_of", lambda truth, account, region: tagged)
    instead.start()
    simulator_ = await simulator.start(Said(known), calls_per_s=0)
    (port,) = free_ports(1)
    try:
        with tempfile.TemporaryDirectory() as home:
            (Path(home) / "yace.yml").write_text(_yaml(known))
            environment = {
                "AWS_ENDPOINT_URL": simulator_.url,
                "AWS_ACCESS_KEY_ID": f"AKIA{ACCOUNT}",
                "AWS_SECRET_ACCESS_KEY": "x",
                "AWS_REGION": REGION,
                "AWS_EC2_METADATA_DISABLED": "true",
                "PATH": os.environ["PATH"],
            }
            process = await asyncio.create_subprocess_exec(
                program,
                *("--config.file", f"{home}/yace.yml", "--listen-address", f"{LOOPBACK}:{port}", *flags),
                env=environment,
                stdout=(Path(home) / "yace.log").open("wb"),
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                text = await _scraped(f"http://{LOOPBACK}:{port}/metrics")
            except TimeoutError as error:
                raise RuntimeError((Path(home) / "yace.log").read_text()[-4000:]) from error
            finally:
                process.terminate()
                await asyncio.wait_for(process.wait(), 10)
    finally:
        instead.stop()
        await simulator_.close()
    return _read(text, len(known))


async def _scraped(url: str, timeout_s: float = 40) -> str:
    """/metrics, once two scrapes of AWS in a row said the same."""
    last, deadline_s = "", time.monotonic() + timeout_s
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline_s:
            await asyncio.sleep(0.5)
            try:
                async with session.get(url) as response:
                    text = await response.text()
            except aiohttp.ClientError:
                continue
            said = "\n".join(sorted(line for line in text.splitlines() if line.startswith("aws_")))
            if said and said == last:
                return text
            last = said
    raise TimeoutError


def _read(text: str, count: int) -> tuple[list[Labels | None], list[Labels]]:
    series: list[Labels | None] = [None] * count
    infos: list[Labels] = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith("aws_"):
                continue
            labels = {"__name__": sample.name} | {k: v for k, v in sample.labels.items() if v}
            if sample.name.endswith("_info"):
                infos.append(labels)
            elif sample.value == sample.value:
                assert series[int(sample.value)] is None, labels
                series[int(sample.value)] = labels
    return series, sorted(infos, key=lambda labels: sorted(labels.items()))


async def facts(program: str) -> dict[str, Any]:
    """The golden file's content."""
    known = cases()
    plain, infos = await taken(program, known)
    snake, infos_snake = await taken(program, known, "--labels-snake-case")
    return {
        "series": [
            asdict(replace(case, yace=one, yace_snake=two))
            for case, one, two in zip(known, plain, snake, strict=True)
        ],
        "info": infos,
        "info_snake": infos_snake,
    }


def _lines(rows: Sequence[object]) -> str:
    return ",\n".join(json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows)


def main() -> int:
    """Write the golden file."""
    program = shutil.which("yace")
    if program is None:
        print("there is no yace on the PATH", file=sys.stderr)
        return 2
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    found = asyncio.run(facts(program))
    sections = (f"{json.dumps(name)}: [\n{_lines(found[name])}\n]" for name in found)
    GOLDEN.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
