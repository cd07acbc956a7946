"""YACE's configuration as one of Headgate: the same series, proved against its rules, and against YACE where it is on the PATH."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from ingest.clock import SystemClock
from ingest.schedule import grids_of
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.document import ConfigErrors
from shard_config.load import load, loads
from shard_config.model import Config
from shard_config.remote_write import RemoteWrite
from shard_config.yace import read
from shard_config.yace_facts import facts, searched
from shard_config.yace_plan import plan_of, render
from tests.cloudwatch_rig import everything_is_answered
from tests.conftest import eventually
from workers import cli
from workers.simulated.resources import resources_of
from workers.simulator import start
from workers.world import Answer, Metric, Question, Truth

FOLDER = Path(__file__).parent / "config" / "yace"
FIFTY = FOLDER / "fifty-jobs.ok.yml"
HOME = "999999999999"
"""The account of jobs without a role."""

T = TypeVar("T")

Asked = tuple[str, str, str, str, tuple[tuple[str, str], ...], str, int]
"""Account, region, namespace, metric, dimensions, statistic, period."""


def translation(text: str, account: str = HOME) -> str:
    return render(plan_of(read(text, "config.yml", account)))


def config_of(text: str) -> Config:
    return loads(translation(text), "headgate.yaml", environ={})


# --- what is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ok.yml")), ids=lambda p: p.name)
def test_what_is_written_loads_and_is_the_same_each_time(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "headgate.yaml"
    assert cli.main(["import", "yace", str(path), "--account", HOME, "--out", str(out)]) == 0
    assert cli.main(["check", str(out)]) == 0
    assert load(out, environ={}).accounts
    assert out.read_text() == render(plan_of(read(path.read_text(), str(path), HOME)))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.bad.yml")), ids=lambda p: p.name)
def test_what_yace_would_misread_is_refused_with_its_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["import", "yace", str(path)]) == 2
    assert all(
        re.match(rf"{re.escape(str(path))}:\d+: ", line) for line in capsys.readouterr().err.splitlines()
    )


def test_all_that_is_wrong_is_said_at_once_with_what_was_meant() -> None:
    path = FOLDER / "everything-wrong.bad.yml"
    with pytest.raises(ConfigErrors) as raised:
        read(path.read_text(), path.name)
    said = str(raised.value)
    for words in (
        ":1: apiVersion: only v1alpha1",
        ':4: discovery.exportedTagsOnMetrics: unknown type "AWS/EC3"',
        'unknown region "eu-wst-1"; did you mean "eu-west-1"?',
        'unknown key "serchTags"; did you mean "searchTags"?',
        '"yace" is not a role',
        "no statistics",
        "a period of 90 s",
        "length 60 is shorter than period 300; length: 300",
        'missing key "name"',
        'missing key "metrics"',
        "expected a list",
        "an externalId without a roleArn",
        '"(" is no regular expression',
        "say --account",
        "expected true or false, got the number 1",
    ):
        assert words in said, words
    assert 'missing key "regions"' not in said  # it is there, and is no list


def test_what_has_no_equivalent_is_listed_with_its_line_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["import", "yace", str(FIFTY)]) == 0
    told = capsys.readouterr()
    text = FIFTY.read_text().splitlines()
    for key in ("nilToZero", "customTags", "roundingPeriod", "exportedTagsOnMetrics", "sts-region"):
        line, todo = re.search(rf":(\d+): {key}: [^;]+; (.+)", told.err).groups()  # type: ignore[union-attr]
        assert key in text[int(line) - 1]
        assert todo
    assert "headgate quote" in told.out


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "headgate.yaml").write_text("mine")
    words = ["import", "yace", str(FOLDER / "discovery.ok.yml"), "--out", str(tmp_path / "headgate.yaml")]
    assert cli.main(words) == 1
    assert (tmp_path / "headgate.yaml").read_text() == "mine"


def test_jobs_without_a_role_need_an_account() -> None:
    with pytest.raises(ConfigErrors, match="say --account"):
        read((FOLDER / "small.ok.yml").read_text(), "small")
    assert [a.id for a in config_of((FOLDER / "small.ok.yml").read_text()).accounts] == [HOME]


# --- labels and zeros -----------------------------------------------------------------------------------------


def written(text: str, tmp_path: Path, *words: str) -> RemoteWrite:
    """`remote_write` of what the import writes."""
    path, out = tmp_path / "config.yml", tmp_path / "headgate.yaml"
    path.write_text(text)
    out.unlink(missing_ok=True)
    command = ["import", "yace", str(path), "--account", HOME, "--out", str(out)]
    assert cli.main([*command, "--remote-write", "http://prometheus:9090/api/v1/write", *words]) == 0
    found = load(out, environ={}).remote_write
    assert found is not None
    return found


def test_labels_and_zeros_have_their_place_in_remote_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = written(FIFTY.read_text(), tmp_path, "--labels-snake-case")
    assert [r.url for r in found.receivers] == ["http://prometheus:9090/api/v1/write"]
    assert (found.names, found.snake_case) == ("yace", True)
    assert found.services["ec2"].exported_tags == ("Name", "team")
    assert set(found.services["alb"].nil_to_zero) == {"RequestCount", "HTTPCode_Target_5XX_Count"}
    assert found.services["example-batch-jobs"].unnamed == "batch"
    [custom] = found.custom_tags
    assert (dict(custom.tags), set(custom.services), len(custom.accounts)) == (
        {"tier": "prod"},
        {"ecs", "elb"},
        12,
    )
    said = capsys.readouterr().err
    for key in ("nilToZero:", "customTags:", "exportedTagsOnMetrics:", "--remote-write"):
        assert key not in said
    assert "sts-region" in said


def test_a_service_that_is_no_shipped_one_is_named_after_its_resources_too(tmp_path: Path) -> None:
    late = "{name: CPUUtilization, statistics: [Average], period: 60}"
    text = discovery(job(CPU), job(late), job("{name: ClusterUsedSpace, statistics: [Sum]}", kind="AWS/ES"))
    written(text, tmp_path)
    services = load(tmp_path / "headgate.yaml", environ={}).services
    assert len(services) == 3
    assert all(service.resources is not None for service in services)
    assert [s.service for s in config_of(text).services if s.resources is None] == ["ec2-2", "es"]


def test_series_of_a_custom_namespace_have_its_jobs_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    role = "{roleArn: arn:aws:iam::123456789012:role/r}"
    jobs = [
        f"  - {{name: {name}, namespace: {namespace}, regions: [eu-west-1], roles: [{role}], metrics: [{CPU}]}}\n"
        for name, namespace in (("mine", "My/App"), ("other", "My/App"), ("direct", "AWS/EC2"))
    ]
    found = written("apiVersion: v1alpha1\ncustomNamespace:\n" + "".join(jobs), tmp_path)
    assert {name: s.unnamed for name, s in found.services.items()} == {"my-app": "mine", "ec2": "direct"}
    said = capsys.readouterr().err
    assert re.search(r":4: the job's name other: .* name=mine", said)
    assert re.search(r":5: the job's name direct: ec2 has tagged resources", said)


def test_tags_and_zeros_that_jobs_of_one_service_do_not_share_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagged = ", customTags: [{key: tier, value: gold}], searchTags: [{key: env, value: ^prod$}]"
    zero = "{name: CPUUtilization, statistics: [Average], nilToZero: true}"
    found = written(discovery(job(zero, tagged), job(CPU)), tmp_path)
    assert found.services["ec2"].nil_to_zero == ("CPUUtilization",)
    assert [(dict(c.tags), c.accounts, c.services) for c in found.custom_tags] == [({"tier": "gold"}, (), ())]
    said = capsys.readouterr().err
    assert re.search(r":5: nilToZero: other jobs", said)
    assert re.search(r":5: customTags of another job", said)


def test_snake_case_is_nothing_without_remote_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import", "yace", str(FOLDER / "discovery.ok.yml"), "--labels-snake-case"]) == 2
    assert "--remote-write" in capsys.readouterr().err


# --- how jobs become services ---------------------------------------------------------------------------------


def job(
    metrics: str,
    more: str = "",
    regions: str = "eu-west-1",
    account: str = "123456789012",
    kind: str = "AWS/EC2",
) -> str:
    role = f"{{roleArn: arn:aws:iam::{account}:role/r}}"
    return f"    - {{type: {kind}, regions: [{regions}], roles: [{role}], metrics: [{metrics}]{more}}}\n"


def discovery(*jobs: str) -> str:
    return "apiVersion: v1alpha1\ndiscovery:\n  jobs:\n" + "".join(jobs)


CPU = "{name: CPUUtilization, statistics: [Average]}"
NET = "{name: NetworkIn, statistics: [Sum]}"


def test_two_services_of_one_target_never_overlap() -> None:
    config = loads(translation(FIFTY.read_text()), "fifty", environ={})
    assert len(config.accounts) == 30
    for account in config.accounts:
        for region in account.regions:
            seen: set[tuple[str, int]] = set()
            for profile in config.services_in(account, region):
                assert (profile.namespace, profile.period_s) not in seen
                seen.add((profile.namespace, profile.period_s))


def test_jobs_that_meet_are_one_service_whose_only_keeps_them_apart() -> None:
    tags = ", searchTags: [{key: env, value: ^prod$}], dimensionNameRequirements: [InstanceId]"
    [ec2] = config_of(discovery(job(CPU, tags), job(NET))).services
    assert ec2.metrics != "all"
    assert {m.name for m in ec2.metrics} == {"CPUUtilization", "NetworkIn"}
    assert {(s.metrics, tuple(s.tags.items())) for s in ec2.only} == {
        (("CPUUtilization",), (("env", "prod"),)),
        (("NetworkIn",), ()),
    }


def test_a_service_of_some_regions_says_which() -> None:
    config = config_of(discovery(job(CPU, regions="eu-west-1, us-east-1"), job("{name: Requests, statistics: [Sum]}", regions="us-east-1", kind="AWS/CloudFront")))  # fmt: skip
    assert {t.region: [g.service for g in grids] for t, grids in grids_of(config).items()} == {
        "eu-west-1": ["ec2"],
        "us-east-1": ["cloudfront", "ec2"],
    }


def test_delay_and_length_are_what_settling_has_to_cover() -> None:
    late = "{name: CPUUtilization, statistics: [Average], period: 60, length: 1200, delay: 900}"
    [ec2] = config_of(discovery(job(late))).services
    assert (ec2.period_s, ec2.poll_interval_s, ec2.settling_s) == (60, 300, 900 + 1200 - 60)


def test_a_delay_beyond_what_cloudwatch_keeps_is_cut_and_said() -> None:
    month = f"{{name: CPUUtilization, statistics: [Average], period: 60, delay: {30 * 86_400}}}"
    plan = plan_of(read(discovery(job(month)), "config.yml"))
    assert any("reach back" in note.what for note in plan.notes)
    assert loads(render(plan), "x", environ={}).services[0].settling_s < 15 * 86_400


def test_another_role_of_an_account_is_said() -> None:
    other = job(CPU).replace("role/r}", "role/other}")
    plan = plan_of(read(discovery(job(NET), other), "config.yml"))
    assert [note.line for note in plan.notes if "is entered by" in note.what] == [5]


def test_an_alias_is_its_namespace_and_every_type_has_a_name_of_ours() -> None:
    known = facts()
    for alias in ("ec2", "alb", "AWS/RDS", "ecs-containerinsights"):
        assert known.namespace(alias)
    every = discovery(*(job(CPU, kind=f"'{namespace}'") for namespace in known.aliases))
    assert len(config_of(every).services) == len(known.aliases)


def test_a_statistic_that_we_do_not_have_is_said_and_left_out() -> None:
    text = discovery(job("{name: CPUUtilization, statistics: [Average, 'TC(1:2)']}"))
    plan = plan_of(read(text, "config.yml"))
    assert any("TC(1:2)" in note.what for note in plan.notes)
    assert dict(next(iter(plan.services.values())).metrics) == {"CPUUtilization": ("Average",)}


@pytest.mark.parametrize(
    "pattern",
    [
        "prod",
        "^prod$",
        "^prod",
        "prod$",
        "a|b",
        "^a|b$",
        "(?i)PROD",
        ".*",
        "",
        "^(a|b)$",
        r"a\.b",
        r"x\$",
        "[ab]+c?",
    ],
)
def test_a_searched_expression_is_matched_as_a_whole_by_ours(pattern: str) -> None:
    ours = searched(pattern)
    assert ours is not None
    for text in (
        "prod",
        "preprod",
        "production",
        "PROD",
        "a",
        "b",
        "ab",
        "xa",
        "bx",
        "",
        "a.b",
        "axb",
        "x$",
        "abc",
        "c",
    ):
        assert bool(re.search(pattern, text)) == bool(re.fullmatch(ours, text)), text


@pytest.mark.parametrize("pattern", ["(", "[[:alpha:]]", r"\pL", "a(?i)b"])
def test_what_python_reads_otherwise_than_go_is_refused(pattern: str) -> None:
    assert searched(pattern) is None


# --- the same series ------------------------------------------------------------------------------------------


class Listed(Truth):
    """A truth of metrics that a YACE configuration is about, and others beside them; it notes down what it is asked for."""

    ages = False
    seed = 2
    _NAMED: Mapping[str, str] = {
        "AWS/ApplicationELB": "LoadBalancer",
        "AWS/CloudFront": "DistributionId",
        "AWS/DynamoDB": "TableName",
        "AWS/EBS": "VolumeId",
        "AWS/EC2": "InstanceId",
        "AWS/ECS": "ClusterName",
        "AWS/ELB": "LoadBalancerName",
        "AWS/ElastiCache": "CacheClusterId",
        "AWS/Kafka": "Cluster Name",
        "AWS/Kinesis": "StreamName",
        "AWS/Lambda": "FunctionName",
        "AWS/NATGateway": "NatGatewayId",
        "AWS/NetworkELB": "LoadBalancer",
        "AWS/RDS": "DBInstanceIdentifier",
        "AWS/S3": "BucketName",
        "AWS/SNS": "TopicName",
        "AWS/SQS": "QueueName",
    }

    def __init__(self, document: Mapping[str, Any], accounts: Sequence[str]) -> None:
        self.accounts = tuple(accounts)
        self.regions = ("eu-west-1", "us-east-1")
        self.asked: set[Asked] = set()
        self._metrics: dict[tuple[str, str], tuple[Metric, ...]] = {}
        self._names: dict[str, set[str]] = {}
        for one in jobs_of(document):
            names = self._names.setdefault(one["namespace"], {"NobodyAsksForThis"})
            names |= {m["name"] for m in one["metrics"]}

    def metrics(self, account: str, region: str) -> Sequence[Metric]:
        key = account, region
        if key not in self._metrics:
            self._metrics[key] = tuple(self._made(account, region))
        return self._metrics[key]

    def _made(self, account: str, region: str) -> Iterator[Metric]:
        for namespace, names in sorted(self._names.items()):
            dimension = self._NAMED.get(namespace, "ResourceId")
            sets: list[tuple[tuple[str, str], ...]] = [
                ((dimension, self._resource(namespace, account, region, n)),) for n in range(8)
            ]
            sets += [(), *(((a[0], "all"),) for a in facts().aggregates.get(namespace, ()))]
            if namespace == "AWS/ApplicationELB":
                sets.append(
                    (("LoadBalancer", sets[0][0][1]), ("TargetGroup", "targetgroup/t/0123456789abcdef"))
                )
            if namespace == "CWAgent":
                sets += [(("InstanceId", "i-0"),), (("InstanceId", "i-0"), ("path", "/"))]
            for name in sorted(names):
                yield from (Metric(namespace, name, tuple(sorted(s)), "None") for s in sets)

    def _resource(self, namespace: str, account: str, region: str, n: int) -> str:
        if namespace == "AWS/SQS" and not n:
            return "queue-checkout.fifo"
        kind = {"AWS/ApplicationELB": "app/", "AWS/NetworkELB": "net/"}.get(namespace, "")
        return f"{kind}DB-{account[-3:]}{region[0]}{n}" + ("/0123456789abcdef" if kind else "")

    def listed(self, account: str, region: str, asked_at_s: int, recently_active: bool) -> Sequence[Metric]:
        return self.metrics(account, region)

    def answers(
        self,
        account: str,
        region: str,
        questions: Sequence[Question],
        start_s: int,
        end_s: int,
        asked_at_s: int,
    ) -> list[Answer]:
        self.asked.update(
            (account, region, q.namespace, q.metric, q.dimensions, q.stat, q.period_s) for q in questions
        )
        return [([], [])] * len(questions)


def jobs_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All jobs, with `kind` and `namespace`."""
    discovery = document.get("discovery") or {}
    jobs = [
        {**j, "kind": "discovery", "namespace": facts().namespace(j["type"])}
        for j in discovery.get("jobs") or ()
    ]
    jobs += [{**j, "kind": "custom"} for j in document.get("customNamespace") or ()]
    return jobs + [{**j, "kind": "static"} for j in document.get("static") or ()]


def accounts_of(job: Mapping[str, Any]) -> list[str]:
    arns = [role.get("roleArn") for role in job.get("roles") or [{}]]
    return [arn.split(":")[4] if arn else HOME for arn in arns]


def named(groups: Mapping[str, T]) -> dict[str, T]:
    """By dimension: an underscore in a group's name is a space in the dimension's."""
    return {name.replace("_", " "): value for name, value in groups.items()}


def yaces(document: Mapping[str, Any], truth: Listed) -> set[Asked]:
    """What YACE asks for, by its own rules: read from its documentation and its behaviour, not from our translation."""
    return {
        asked
        for one in jobs_of(document)
        for account in accounts_of(one)
        for region in one["regions"]
        for asked in _yaces(one, truth, account, region)
    }


def _yaces(one: Mapping[str, Any], truth: Listed, account: str, region: str) -> Iterator[Asked]:
    namespace = one["namespace"]
    known = facts().resources.get(namespace) if one["kind"] == "discovery" else None
    arns = [re.compile(arn) for arn in known.arns] if known else []
    kept = [
        r.arn
        for r in resources_of(truth, account, region)
        if r.tags
        and all(
            t["key"] in r.tags and re.search(t["value"], r.tags[t["key"]])
            for t in one.get("searchTags") or ()
        )
    ]
    found = [named(m.groupdict()) for arn in arns for a in kept if (m := arn.search(a))]
    if known and not found:  # none made it through the filter: YACE leaves the whole job out
        return
    for metric in one["metrics"]:
        period_s = metric.get("period") or one.get("period") or 300
        for stat in metric.get("statistics") or one["statistics"]:
            for listed in truth.metrics(account, region):
                if (listed.namespace, listed.name) == (namespace, metric["name"]) and _yace_keeps(
                    one, dict(listed.dimensions), found, arns
                ):
                    yield (account, region, namespace, listed.name, listed.dimensions, stat, period_s)


def _yace_keeps(
    one: Mapping[str, Any],
    has: Mapping[str, str],
    found: Sequence[Mapping[str, str]],
    arns: Iterable[re.Pattern[str]],
) -> bool:
    if one["kind"] == "static":
        return has == {d["name"]: d["value"] for d in one.get("dimensions") or ()}
    required = one.get("dimensionNameRequirements")
    if required and set(required) != set(has):
        return False
    mapped = [a for a in arns if set(named(a.groupindex)) <= set(has)]
    if not mapped:  # of no resource: YACE calls it global
        return True
    return any(all(has.get(k) == v for k, v in groups.items()) for groups in found)


async def ours(config: Config, truth: Listed) -> set[Asked]:
    """What our source asks a simulated AWS for, in one look at every service of every target."""
    clock = SystemClock()
    simulator = await start(truth, calls_per_s=0)
    config = config.model_copy(update={"aws": config.aws.model_copy(update={"endpoint_url": simulator.url})})
    source = CloudWatchSource(config, clock)
    try:
        for target, grids in grids_of(config).items():
            for grid in grids:
                await everything_is_answered(source, target, grid, clock)
    finally:
        await source.close()
        await simulator.close()
    return truth.asked


def small_fifty() -> str:
    """The fifty jobs over one account of each kind: as many rules, a tenth of the looks."""
    text = FIFTY.read_text()
    out, kept = [], 0
    for line in text.splitlines(keepends=True):
        if re.match(r"\s+roles: &", line):
            kept = 0
        if "roleArn" in line:
            kept += 1
            if kept > 1:
                continue
        out.append(line)
    return "".join(out)


def is_untagged(truth: Listed, asked: Asked) -> bool:
    """Whether it is of a resource that was never tagged, which YACE does not see."""
    account, region, namespace, _, dimensions, _, _ = asked
    known, has = facts().resources.get(namespace), dict(dimensions)
    if known is None:
        return False
    arns = [re.compile(arn) for arn in known.arns]
    mapped = [a for a in arns if set(named(a.groupindex)) <= set(has)]
    tagged = [
        named(m.groupdict())
        for r in resources_of(truth, account, region)
        if r.tags
        for a in arns
        if (m := a.search(r.arn))
    ]
    return bool(mapped) and not any(all(has.get(k) == v for k, v in groups.items()) for groups in tagged)


def widened(document: Mapping[str, Any], truth: Listed) -> set[Asked]:
    """What a note says that Headgate asks beyond YACE: all statistics of a metric that jobs ask different ones of."""
    found: set[Asked] = set()
    asked = yaces(document, truth)
    stats: dict[tuple[str, str, str, str, int], set[str]] = {}
    for account, region, namespace, metric, _, stat, period_s in asked:
        stats.setdefault((account, region, namespace, metric, period_s), set()).add(stat)
    for account, region, namespace, metric, dimensions, _, period_s in asked:
        for stat in stats[account, region, namespace, metric, period_s]:
            found.add((account, region, namespace, metric, dimensions, stat, period_s))
    return found


@pytest.mark.parametrize("name", ["discovery.ok.yml", "small.ok.yml", "fifty"])
async def test_our_source_asks_for_the_series_that_yace_would_ask_for(name: str) -> None:
    text = small_fifty() if name == "fifty" else (FOLDER / name).read_text()
    document = yaml.safe_load(text)
    config = config_of(text)
    truth = Listed(document, [a.id for a in config.accounts])
    theirs, asked = yaces(document, truth), await ours(config, truth)
    assert theirs
    assert sorted(theirs - asked) == []
    beyond = {a for a in asked - widened(document, truth) if not is_untagged(truth, a)}
    assert sorted(beyond) == []


async def test_yace_itself_asks_for_no_series_that_we_do_not(tmp_path: Path) -> None:
    program = shutil.which("yace")
    if program is None:
        pytest.skip("there is no yace on the PATH")
    text = small_fifty()
    text = text[: text.index("static:")]  # for those YACE asks another API
    document = yaml.safe_load(text)
    config = config_of(text)
    accounts = [a.id for a in config.accounts]
    theirs = Listed(document, accounts)
    path = tmp_path / "config.yml"
    path.write_text(re.sub(r"type: alb\b", "type: AWS/ApplicationELB", text))
    simulator = await start(theirs, calls_per_s=0)
    environment = {
        "AWS_ENDPOINT_URL": simulator.url,
        "AWS_ACCESS_KEY_ID": f"AKIA{accounts[0]}",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "eu-west-1",
        "PATH": os.environ["PATH"],
    }
    process = await asyncio.create_subprocess_exec(
        program,
        *("--config.file", str(path), "--listen-address", "127.0.0.1:0"),
        env=environment,
        stdout=(tmp_path / "yace.log").open("wb"),
        stderr=asyncio.subprocess.STDOUT,
    )
    wanted = yaces(document, theirs)
    try:

        async def asked_for_all() -> bool:
            return wanted <= theirs.asked

        with contextlib.suppress(AssertionError):  # what is missing, the comparison below says
            await eventually(asked_for_all, timeout_s=30)
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10)
        await simulator.close()
    assert sorted(wanted - theirs.asked) == []
    assert sorted(theirs.asked - wanted) == []
    assert theirs.asked <= await ours(config, Listed(document, accounts))
