"""For each alert when it fires and when not, in promtool's notation: a value a minute; `5x10` is 5 eleven times, `0+60x10` rises by 60.

`_` is a minute without a sample (of a series that is not there yet), `stale` the end of one (of a process that went).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Series = Mapping[str, str]
"""Selector → values."""


@dataclass(frozen=True, slots=True)
class Scene:
    """When an alert fires. All times are minutes."""

    alert: str
    series: Series
    quiet_until_m: int
    """Up to here it does not fire, at any minute."""
    fires_at_m: int
    """Here it does: once, with exactly these labels besides its severity."""
    labels: Mapping[str, str] = field(default_factory=dict)
    says: str | None = None
    """Its summary; None where its number is extrapolated."""
    step_m: int = 1
    """Between two values, and two evaluations."""


@dataclass(frozen=True, slots=True)
class Quiet:
    """When an alert does not fire: at no evaluation, up to the end of the longest series."""

    alert: str
    why: str
    series: Series
    step_m: int = 1


PLAN = "headgate_coordinator_last_plan_timestamp_seconds"
SLOTS = "headgate_shard_slots"
WAITING = "headgate_tasks_waiting"
LAG = "headgate_consumer_lag_records"
REFUSING = "headgate_archive_refusing_seconds"
OPEN = "headgate_open_windows"
FRESH = "headgate_target_freshness_seconds"
LEDGER = "headgate_ledger_observed_timestamp_seconds"
SNAPSHOT = "headgate_snapshot_timestamp_seconds"
KEY = '{account="1",region="eu-west-1",api="GetMetricData"}'
ASKED, THROTTLED = f"headgate_aws_requests_total{KEY}", f"headgate_aws_throttled_total{KEY}"
STORE, CAPACITY = 'headgate_store_bytes{sink="postgres"}', 'headgate_store_capacity_bytes{sink="postgres"}'
DEAD, BATCHES, POINTS = "headgate_dead_total", "headgate_batches_landed_total", "headgate_points_landed_total"
BEHIND, DIRTY = "headgate_rollup_behind_seconds", "headgate_rollup_dirty"
STRETCH = "headgate_poll_stretch"
SPEND, FORECAST = 'headgate_spend_usd_today{account="1"}', 'headgate_spend_forecast_usd_today{account="1"}'
BUDGET = 'headgate_budget_usd{account="1"}'
FAILING, RW_LAG = "headgate_remote_write_failing", "headgate_remote_write_lag_records"
SKIPPED = "headgate_remote_write_skipped_records_total"
REFUSED, SENT = "headgate_remote_write_refused_total", 'headgate_remote_write_samples_total{receiver="p1"}'
TOPIC = "headgate.raw"

POLLS = " ".join(["0 40 25 10 0"] * 24)
"""What a poll brings is done before the next one: two hours."""
BIG_POLLS = " ".join(["0 4000 2500 1000 0"] * 24)
GROWS = "0x30 0+5x90"
GROWS_MUCH = "0x30 0+200x90"
SHRINKS = "0x20 5000-50x90"
SAWTOOTH = " ".join(["67x192", *["60+0.3x47"] * 8])
"""Each day a day's samples come and a day's are dropped: eight days after four quiet ones."""

SCENES = (
    Scene("HeadgateWatchdog", {}, -1, 0, says="This alert always fires"),
    Scene("HeadgateNoCoordinator", {PLAN: "0+60x10 600x30"}, 17, 18, says="No coordinator plans what is due"),
    Scene("HeadgateNoCoordinator", {}, 4, 5),
    Scene(
        "HeadgateSlotsWithoutShard",
        {"headgate_slots_unowned": "0x10 3x30"},
        15,
        16,
        says="3 slots have no shard",
    ),
    Scene(
        "HeadgateShardWithoutSlots",
        {f'{SLOTS}{{shard="exporter-3"}}': "2x5 0x40", f'{SLOTS}{{shard="exporter-1"}}': "8x50"},
        20,
        21,
        {"shard": "exporter-3"},
        "exporter-3 lives and has no slot",
    ),
    Scene(
        "HeadgateShardFallsBehind",
        {f'{WAITING}{{instance="e1"}}': GROWS, f'{WAITING}{{instance="e2"}}': POLLS},
        60,
        75,
        {"instance": "e1"},
    ),
    Scene(
        "HeadgateLagGrowing",
        {
            f'{LAG}{{instance="c1",topic="{TOPIC}"}}': GROWS_MUCH,
            f'{LAG}{{instance="c2",topic="{TOPIC}"}}': BIG_POLLS,
            f'{LAG}{{instance="c1",topic="headgate.ledger"}}': "0x120",
        },
        60,
        75,
        {"topic": TOPIC},
    ),
    Scene(
        "HeadgateArchiveRefusing",
        {f'{REFUSING}{{instance="e1"}}': "0x10 60+60x30", f'{REFUSING}{{instance="e2"}}': "0x40"},
        20,
        21,
        {"instance": "e1"},
        "The archive has taken nothing of e1 for 11m 0s",
    ),
    Scene(
        "HeadgateThrottled",
        {ASKED: "0+100x90", THROTTLED: "0x30 0+20x60"},
        48,
        60,
        {"account": "1", "region": "eu-west-1", "api": "GetMetricData"},
        "AWS throttles 20% of GetMetricData of 1 in eu-west-1",
    ),
    Scene(
        "HeadgateIdentityMismatch",
        {'headgate_identity_mismatch{account="1"}': "_x6 1x10"},
        6,
        7,
        {"account": "1"},
        "The credentials for 1 are another account's",
    ),
    Scene(
        "HeadgateDeadLetterShare",
        {f'{DEAD}{{kind="record"}}': "0x30 0+5x60", f'{BATCHES}{{way="copied"}}': "0+100x90"},
        40,
        55,
        {"kind": "record"},
    ),
    Scene(
        "HeadgateDeadLetterShare",
        {
            f'{DEAD}{{kind="record"}}': "0x90",
            f'{DEAD}{{kind="point"}}': "0x30 0+500x60",
            f'{BATCHES}{{way="copied"}}': "0+100x90",
            POINTS: "0+10000x90",
        },
        40,
        55,
        {"kind": "point"},
    ),
    Scene(
        "HeadgateLedgerNotObserved", {LEDGER: "0+60x10 600x30"}, 22, 23, says="No consumer reads the ledger"
    ),
    Scene("HeadgateLedgerNotObserved", {}, 9, 10),
    Scene(
        "HeadgateSnapshotOld",
        {SNAPSHOT: "0x400"},
        2940,
        2970,
        says="The ledger has had no snapshot for two days",
        step_m=30,
    ),
    Scene(
        "HeadgateWindowsOpenPastDeadline",
        {f'{OPEN}{{reason="failed"}}': "0x5 4x30", f'{OPEN}{{reason="in_time"}}': "9x40"},
        20,
        21,
        {"reason": "failed"},
        "4 windows are open past their deadline: failed",
    ),
    Scene(
        "HeadgateWindowsUnbalanced",
        {f'{OPEN}{{reason="unbalanced"}}': "0x5 4x30"},
        20,
        21,
        says="4 windows whose rows in the store are not what was collected",
    ),
    Scene(
        "HeadgateOldestOpenWindow",
        {"headgate_oldest_open_window_seconds": "604801x70"},
        59,
        60,
        says="The oldest open window ended 7d 0h 0m 1s ago",
    ),
    Scene(
        "HeadgateWindowsDeclared",
        {'headgate_windows_declared_total{reason="unrecoverable"}': "0x10 3x60"},
        10,
        11,
        {"reason": "unrecoverable"},
    ),
    Scene(
        "HeadgateTargetStale",
        {f'{FRESH}{{target="t1"}}': "60x5 3601+60x30", f'{FRESH}{{target="t2"}}': "300x40"},
        15,
        16,
        {"target": "t1"},
        "Nothing of t1 has landed for 1h 10m 1s",
    ),
    Scene(
        "HeadgateRollupsBehind",
        {f'{BEHIND}{{instance="c1"}}': "0+60x450", f'{BEHIND}{{instance="c2"}}': "0x450", DIRTY: "5x450"},
        390,
        391,
    ),
    Scene(
        "HeadgateStoreNearFull",
        {STORE: "89x5 95x30", CAPACITY: "100x40"},
        20,
        21,
        {"sink": "postgres"},
        "The store is 95% full",
    ),
    Scene(
        "HeadgateStoreFilling",
        {STORE: "40+0.3x50", CAPACITY: "100x50"},
        1110,
        1200,
        {"sink": "postgres"},
        step_m=30,
    ),
    Scene(
        "HeadgateConfigInvalid",
        {
            'headgate_config_invalid{instance="e1"}': "0x5 1x30",
            'headgate_config_invalid{instance="e2"}': "0x40",
        },
        7,
        8,
        {"instance": "e1"},
        "e1 refuses the configuration file as it stands now",
    ),
    Scene(
        "HeadgateConfigDiffers",
        {
            'headgate_config_revision_info{instance="e1",revision="a"}': "1x40",
            'headgate_config_revision_info{instance="e2",revision="b"}': "_x6 1x40",
        },
        20,
        21,
        says="2 configurations are in use at once",
    ),
    Scene(
        "HeadgateOrganizationNotListed",
        {"headgate_organization_list_age_seconds": "14401x30"},
        14,
        15,
        says="The organization's list of accounts is 4h 0m 1s old",
    ),
    Scene(
        "HeadgatePollsStretched",
        {f'{STRETCH}{{account="1",service="ec2"}}': "_x6 3x30"},
        10,
        11,
        {"account": "1", "service": "ec2"},
        "ec2 of 1 is polled each 3 intervals only, for a budget",
    ),
    Scene(
        "HeadgatePollsStopped",
        {f'{STRETCH}{{account="1",service="ec2"}}': "_x6 0x30"},
        5,
        6,
        {"account": "1", "service": "ec2"},
        "ec2 of 1 is not polled until midnight UTC: the day's dollars are spent",
    ),
    Scene(
        "HeadgateBudgetNear",
        {FORECAST: "8x10 9.5x60", BUDGET: "10x80"},
        40,
        41,
        {"account": "1"},
        "1 will cost $9.5 by midnight UTC: nearly its budget",
    ),
    Scene(
        "HeadgateBudgetTooSmall",
        {FORECAST: "9x10 11x40", SPEND: "5x60", BUDGET: "10x60"},
        25,
        26,
        {"account": "1"},
        "1 will cost $11 by midnight UTC: more than its budget",
    ),
    Scene(
        "HeadgateBudgetPassed",
        {SPEND: "9x10 11x40", BUDGET: "10x60"},
        10,
        11,
        {"account": "1"},
        "1 has cost $11 today: more than its budget",
    ),
    Scene(
        "HeadgateSpendJumps",
        {SPEND: "2x288 4x30"},
        1455,
        1460,
        {"account": "1"},
        "1 has cost $4 today, half as much again as yesterday at this time",
        step_m=5,
    ),
    Scene(
        "HeadgateRemoteWriterGone",
        {
            f'{FAILING}{{instance="r1",receiver="p1"}}': "0x20 stale",
            f'{FAILING}{{instance="r2",receiver="p2"}}': "0x60",
        },
        30,
        31,
        {"receiver": "p1"},
        "No remote writer serves p1 any more",
    ),
    Scene(
        "HeadgateRemoteWriteFailing",
        {f'{FAILING}{{receiver="p1"}}': "0x10 1x30", f'{FAILING}{{receiver="p2"}}': "0x40"},
        20,
        21,
        {"receiver": "p1"},
        "p1 takes no samples",
    ),
    Scene(
        "HeadgateRemoteWriteLagging",
        {f'{RW_LAG}{{receiver="p1"}}': GROWS_MUCH, f'{RW_LAG}{{receiver="p2"}}': BIG_POLLS},
        60,
        75,
        {"receiver": "p1"},
    ),
    Scene(
        "HeadgateRemoteWriteRefusing",
        {f'{REFUSED}{{receiver="p1",reason="too_old"}}': "0x40 0+10x90", SENT: "0+100x130"},
        50,
        75,
        {"receiver": "p1", "reason": "too_old"},
    ),
    Scene(
        "HeadgateRemoteWriteSkipped",
        {f'{SKIPPED}{{receiver="p1"}}': "_x6 5x30", f'{SKIPPED}{{receiver="p2"}}': "0x40"},
        7,
        8,
        {"receiver": "p1"},
        "Kafka dropped records before p1 had them",
    ),
)

QUIET = (
    Quiet("HeadgateNoCoordinator", "it restarts", {f'{PLAN}{{instance="a"}}': "0+60x10 stale", f'{PLAN}{{instance="b"}}': "_x12 0 840+60x30"}),
    Quiet("HeadgateNoCoordinator", "Kafka is away for some minutes", {PLAN: "0+60x10 600x5 1020+60x30"}),
    Quiet("HeadgateNoCoordinator", "one of two goes", {f'{PLAN}{{instance="a"}}': "0+60x40", f'{PLAN}{{instance="b"}}': "0+60x10 600x30"}),
    Quiet("HeadgateSlotsWithoutShard", "all exporters restart", {"headgate_slots_unowned": "0x10 24x3 0x20"}),
    Quiet("HeadgateSlotsWithoutShard", "the coordinator restarts", {'headgate_slots_unowned{instance="a"}': "0x10 stale", 'headgate_slots_unowned{instance="b"}': "_x11 0x20"}),
    Quiet("HeadgateShardWithoutSlots", "a new shard waits for its first slots", {f'{SLOTS}{{shard="exporter-3"}}': "0x10 8x20"}),
    Quiet("HeadgateShardWithoutSlots", "a shard is taken away", {f'{SLOTS}{{shard="exporter-3"}}': "8x10 0 stale"}),
    Quiet("HeadgateShardFallsBehind", "polls come in bursts", {WAITING: POLLS}),
    Quiet("HeadgateShardFallsBehind", "a backlog shrinks", {WAITING: SHRINKS}),
    Quiet("HeadgateShardFallsBehind", "it restarts", {f'{WAITING}{{instance="a"}}': "40x30 stale", f'{WAITING}{{instance="b"}}': "_x32 200x5 0x60"}),
    Quiet("HeadgateLagGrowing", "polls come in bursts", {f'{LAG}{{topic="{TOPIC}"}}': BIG_POLLS}),
    Quiet("HeadgateLagGrowing", "a backlog shrinks", {f'{LAG}{{topic="{TOPIC}"}}': SHRINKS}),
    Quiet("HeadgateLagGrowing", "a consumer is down for some minutes", {f'{LAG}{{instance="a",topic="{TOPIC}"}}': "0x30 stale", f'{LAG}{{instance="b",topic="{TOPIC}"}}': "_x35 8000x8 0x90"}),
    Quiet("HeadgateArchiveRefusing", "S3 is away for some minutes", {REFUSING: "0x10 60+60x7 0x30"}),
    Quiet("HeadgateThrottled", "some minutes of throttling", {ASKED: "0+100x90", THROTTLED: "0x30 0+20x5 100x50"}),
    Quiet("HeadgateThrottled", "one of few requests", {ASKED: "0+1x90", THROTTLED: "0+0.5x90"}),
    Quiet("HeadgateThrottled", "the shard restarts", {ASKED: "0+100x45 0+100x45", THROTTLED: "0+1x45 0+1x45"}),
    Quiet("HeadgateIdentityMismatch", "put right at once", {'headgate_identity_mismatch{account="1"}': "_x6 1 stale"}),
    Quiet("HeadgateDeadLetterShare", "one bad endpoint among many", {f'{DEAD}{{kind="record"}}': "0x30 0+0.5x60", f'{BATCHES}{{way="copied"}}': "0+100x90"}),
    Quiet("HeadgateDeadLetterShare", "some bad minutes", {f'{DEAD}{{kind="record"}}': "0x30 0+5x5 30x60", f'{BATCHES}{{way="copied"}}': "0+100x100"}),
    Quiet("HeadgateDeadLetterShare", "the consumer restarts", {f'{DEAD}{{kind="record"}}': "500x45 0x45", f'{BATCHES}{{way="copied"}}': "0+100x45 0+100x45"}),
    Quiet("HeadgateDeadLetterShare", "nothing comes at all", {f'{DEAD}{{kind="record"}}': "5x60", f'{BATCHES}{{way="copied"}}': "100x60"}),
    Quiet("HeadgateLedgerNotObserved", "PostgreSQL is away for some minutes", {LEDGER: "0+60x10 600x9 1260+60x30"}),
    Quiet("HeadgateLedgerNotObserved", "one of two consumers hangs", {f'{LEDGER}{{instance="a"}}': "0+60x40", f'{LEDGER}{{instance="b"}}': "0+60x10 600x30"}),
    Quiet("HeadgateSnapshotOld", "a day is missed", {SNAPSHOT: "0x94 169200x90"}, step_m=30),
    Quiet("HeadgateWindowsOpenPastDeadline", "healing closes them", {f'{OPEN}{{reason="failed"}}': "0x5 4x12 0x30"}),
    Quiet("HeadgateWindowsOpenPastDeadline", "they are in time, paused, or another alert's", {f'{OPEN}{{reason="{reason}"}}': "4x40" for reason in ("in_time", "paused", "unbalanced")}),
    Quiet("HeadgateWindowsUnbalanced", "a newer look lands", {f'{OPEN}{{reason="unbalanced"}}': "0x5 4x12 0x30"}),
    Quiet("HeadgateOldestOpenWindow", "six days are not a week", {"headgate_oldest_open_window_seconds": "518400x90"}),
    Quiet("HeadgateOldestOpenWindow", "healed within the hour", {"headgate_oldest_open_window_seconds": "604801x50 0x60"}),
    Quiet("HeadgateWindowsDeclared", "the target was removed", {'headgate_windows_declared_total{reason="removed"}': "0x10 3x60"}),
    Quiet("HeadgateWindowsDeclared", "the coordinator restarts", {'headgate_windows_declared_total{reason="abandoned"}': "3x10 0x60"}),
    Quiet("HeadgateTargetStale", "it lands again", {f'{FRESH}{{target="t1"}}': "60x5 3601x8 300x30"}),
    Quiet("HeadgateTargetStale", "the target is removed", {f'{FRESH}{{target="t1"}}': "3500+60x6 stale"}),
    Quiet("HeadgateRollupsBehind", "a backfill is worked off", {BEHIND: "0+60x600", DIRTY: "2000-2x600"}),
    Quiet("HeadgateRollupsBehind", "no consumer for some hours, and then one", {BEHIND: "0x5 _x300 18000+60x40 0x60", DIRTY: "0x5 _x300 300x40 0x60"}),
    Quiet("HeadgateStoreNearFull", "what it may have is not known", {STORE: "95x40"}),
    Quiet("HeadgateStoreNearFull", "room is made", {STORE: "95x12 60x30", CAPACITY: "100x50"}),
    Quiet("HeadgateStoreFilling", "it does not grow", {STORE: "60x200", CAPACITY: "100x200"}, 30),
    Quiet("HeadgateStoreFilling", "it grows slowly", {STORE: "60+0.03x200", CAPACITY: "100x200"}, 30),
    Quiet("HeadgateStoreFilling", "a day comes and a day goes", {STORE: SAWTOOTH, CAPACITY: "100x600"}, 30),
    Quiet("HeadgateStoreFilling", "it is near full, which another alert says", {STORE: "91+0.1x60", CAPACITY: "100x60"}, 30),
    Quiet("HeadgateStoreFilling", "the consumer moves", {STORE.replace("{", '{instance="a",'): "60x50 stale", STORE.replace("{", '{instance="b",'): "_x52 60x50", CAPACITY: "100x102"}, 30),
    Quiet("HeadgateConfigInvalid", "mended at once", {"headgate_config_invalid": "0x5 1 0x30"}),
    Quiet("HeadgateConfigDiffers", "workers take it one after the other", {'headgate_config_revision_info{instance="e1",revision="a"}': "1x10 stale", 'headgate_config_revision_info{instance="e2",revision="b"}': "_x6 1x40"}),
    Quiet("HeadgateOrganizationNotListed", "an hour without", {"headgate_organization_list_age_seconds": "900x10 3600x60"}),
    Quiet("HeadgatePollsStretched", "it is stopped, which another alert says", {f'{STRETCH}{{account="1",service="ec2"}}': "0x30"}),
    Quiet("HeadgatePollsStretched", "for a moment", {f'{STRETCH}{{account="1",service="ec2"}}': "_x6 2x3 stale"}),
    Quiet("HeadgatePollsStopped", "it is stretched, which another alert says", {f'{STRETCH}{{account="1",service="ec2"}}': "2x30"}),
    Quiet("HeadgateBudgetNear", "it is stretched, which another alert says", {FORECAST: "9.5x60", BUDGET: "10x60", f'{STRETCH}{{account="1",service="ec2"}}': "2x60"}),
    Quiet("HeadgateBudgetNear", "the budget of all, where one is stretched", {FORECAST.replace('"1"', '"all"'): "9.5x60", BUDGET.replace('"1"', '"all"'): "10x60", f'{STRETCH}{{account="1",service="ec2"}}': "2x60"}),
    Quiet("HeadgateBudgetNear", "it is too small, which another alert says", {FORECAST: "11x60", BUDGET: "10x60"}),
    Quiet("HeadgateBudgetNear", "there is no budget", {FORECAST: "11x60"}),
    Quiet("HeadgateBudgetTooSmall", "it is passed, which another alert says", {FORECAST: "12x60", SPEND: "11x60", BUDGET: "10x60"}),
    Quiet("HeadgateBudgetTooSmall", "stretching keeps it", {FORECAST: "11x10 9x60", SPEND: "5x70", BUDGET: "10x70"}),
    Quiet("HeadgateBudgetPassed", "it is just kept", {SPEND: "10x30", BUDGET: "10x30"}),
    Quiet("HeadgateSpendJumps", "as yesterday", {SPEND: "0+0.01x287 0+0.01x287"}, 5),
    Quiet("HeadgateSpendJumps", "twice as much of nothing", {SPEND: "0.2x288 0.4x60"}, 5),
    Quiet("HeadgateRemoteWriterGone", "it restarts", {f'{FAILING}{{instance="a",receiver="p1"}}': "0x20 stale", f'{FAILING}{{instance="b",receiver="p1"}}': "_x27 0x60"}),
    Quiet("HeadgateRemoteWriteFailing", "the receiver restarts", {f'{FAILING}{{receiver="p1"}}': "0x10 1x8 0x30"}),
    Quiet("HeadgateRemoteWriteLagging", "it fails, which another alert says", {f'{RW_LAG}{{receiver="p1"}}': GROWS_MUCH, f'{FAILING}{{receiver="p1"}}': "0x30 1x90"}),
    Quiet("HeadgateRemoteWriteLagging", "it catches up", {f'{RW_LAG}{{receiver="p1"}}': SHRINKS}),
    Quiet("HeadgateRemoteWriteRefusing", "values changed after they were sent", {f'{REFUSED}{{receiver="p1",reason="changed"}}': "0+50x130", SENT: "0+100x130"}),
    Quiet("HeadgateRemoteWriteRefusing", "some minutes of it", {f'{REFUSED}{{receiver="p1",reason="too_old"}}': "0x40 0+10x2 20x90", SENT: "0+100x130"}),
    Quiet("HeadgateRemoteWriteRefusing", "the writer restarts", {f'{REFUSED}{{receiver="p1",reason="too_old"}}': "900x45 0x45", SENT: "0+100x45 0+100x45"}),
    Quiet("HeadgateRemoteWriteSkipped", "the writer restarts an hour later", {f'{SKIPPED}{{instance="a",receiver="p1"}}': "0x70 stale", f'{SKIPPED}{{instance="b",receiver="p1"}}': "_x72 0x60"}),
)  # fmt: skip
