"""Dashboards of Headgate itself: pipeline, shards, cost, completeness, remote write. Each panel says what it means when it is high. Pure."""

from __future__ import annotations

from typing import Final

from workers.grafana import Dashboard, Panel, Query, Row, Variable

_RED_ABOVE_0: Final = ((1.0, "red"),)
_OURS: Final = "* on (instance) group_left () max by (instance) (headgate_config_revision_info)"
"""Of what every process has, only that of Headgate's workers."""

FIRING: Final = Panel(
    "Alerts that fire",
    "Each has a page in docs/runbooks. Empty is good, if Prometheus has the rules of files/rules/alerts.yml.",
    (Query('ALERTS{alertname=~"Headgate.+",alertstate="firing",severity!="none"}'),),
    kind="table",
    width=24,
    height=5,
)
PIPELINE: Final = Dashboard(
    "headgate-pipeline",
    "Headgate: pipeline",
    "Whether what is due is planned, collected, archived and landed, and how far behind each part is. Look here first.",
    (
        Row(
            "Now",
            (
                FIRING,
                Panel(
                    "Planned last",
                    "How long ago what was due was planned and on Kafka. More than seconds: no coordinator, or no Kafka.",
                    (Query("time() - max(headgate_coordinator_last_plan_timestamp_seconds)"),),
                    "s", "stat", 4, 4, ((30, "orange"), (120, "red")),
                ),
                Panel(
                    "Ledger read last",
                    "How long ago a consumer read the ledger. More: no consumer, or no PostgreSQL, and all that is said of windows is old.",
                    (Query("time() - max(headgate_ledger_observed_timestamp_seconds)"),),
                    "s", "stat", 4, 4, ((60, "orange"), (120, "red")),
                ),
                Panel(
                    "Windows past their deadline",
                    "Neither sealed nor declared, what is paused aside. `headgate gaps` lists them.",
                    (Query('sum(max by (reason) (headgate_open_windows{reason!~"in_time|paused"})) or vector(0)'),),
                    "short", "stat", 4, 4, _RED_ABOVE_0,
                ),
                Panel(
                    "Stalest target",
                    "Age of the newest landed window of the target that is furthest behind.",
                    (Query("max(headgate_target_freshness_seconds)"),),
                    "s", "stat", 4, 4, ((1800, "orange"), (3600, "red")),
                ),
                Panel(
                    "Records waiting",
                    "On Kafka, for consumers. It falls to nothing between two polls.",
                    (Query("sum(headgate_consumer_lag_records)"),),
                    "short", "stat", 4, 4, ((1000, "orange"), (100_000, "red")),
                ),
                Panel(
                    "Dollars today",
                    "What AWS has billed for the metrics API this UTC day, of all accounts.",
                    (Query('max(headgate_spend_usd_today{account="all"})'),),
                    "currencyUSD", "stat", 4, 4,
                ),
            ),
        ),
        Row(
            "Collecting",
            (
                Panel(
                    "Tasks planned",
                    "A task is one poll of one target. live: as due. backlog, heal, again, replay: after an outage.",
                    (Query("sum by (kind) (rate(headgate_tasks_planned_total[$__rate_interval]))", "{{kind}}"),),
                    "cps", stacked=True,
                ),
                Panel(
                    "Tasks done",
                    "By how their looks went. What is not complete says why in the exporter's log (look_not_complete), and is healed.",
                    (Query("sum by (status) (rate(headgate_tasks_total[$__rate_interval]))", "{{status}}"),),
                    "cps", stacked=True,
                ),
                Panel(
                    "A task takes",
                    "From its being taken up to its receipt. Above the poll interval the shards fall behind: add some.",
                    (
                        Query("histogram_quantile(0.5, sum by (le) (rate(headgate_task_seconds_bucket[$__rate_interval])))", "half"),
                        Query("histogram_quantile(0.95, sum by (le) (rate(headgate_task_seconds_bucket[$__rate_interval])))", "95 of 100"),
                    ),
                    "s", steps=((300, "red"),),
                ),
                Panel(
                    "Points",
                    "Collected: new or changed, so published. Unchanged: seen again, and left out.",
                    (
                        Query("sum(rate(headgate_points_collected_total[$__rate_interval]))", "collected"),
                        Query("sum(rate(headgate_points_unchanged_total[$__rate_interval]))", "unchanged"),
                    ),
                    "cps",
                ),
                Panel(
                    "Archive",
                    "Tasks put into S3. What is refused is not published: see HeadgateArchiveRefusing.",
                    (Query("sum by (result) (rate(headgate_archive_puts_total[$__rate_interval]))", "{{result}}"),),
                    "cps", stacked=True,
                ),
                Panel(
                    "Requests to sources",
                    "Retries included.",
                    (Query("sum by (api) (rate(headgate_requests_total[$__rate_interval]))", "{{api}}"),),
                    "reqps",
                ),
            ),
        ),
        Row(
            "Landing",
            (
                Panel(
                    "Records waiting",
                    "By topic. Polls come in bursts; what rises from trough to trough does not keep up.",
                    (Query("sum by (topic) (headgate_consumer_lag_records)", "{{topic}}"),),
                ),
                Panel(
                    "Points landed",
                    "Those that were known already included.",
                    (Query("sum(rate(headgate_points_landed_total[$__rate_interval]))", "points"),),
                    "cps",
                ),
                Panel(
                    "A transaction takes",
                    "One landing in PostgreSQL. Above a second: its disk, locks, a vacuum.",
                    (
                        Query("histogram_quantile(0.5, sum by (le) (rate(headgate_land_seconds_bucket[$__rate_interval])))", "half"),
                        Query("histogram_quantile(0.95, sum by (le) (rate(headgate_land_seconds_bucket[$__rate_interval])))", "95 of 100"),
                    ),
                    "s", steps=((3, "orange"), (10, "red")),
                ),
                Panel(
                    "Batches by way",
                    "copied: fresh rows. merged: some were there, compared. known: landed before, skipped.",
                    (Query("sum by (way) (rate(headgate_batches_landed_total[$__rate_interval]))", "{{way}}"),),
                    "cps", stacked=True,
                ),
                Panel(
                    "Dead letters",
                    "Records and points put aside in the last hour. `headgate dead list` says why.",
                    (Query("sum by (kind) (increase(headgate_dead_total[1h]))", "{{kind}}"),),
                    "short", steps=_RED_ABOVE_0,
                ),
                Panel(
                    "Configurations in use",
                    "Workers by revision. One line, but for minutes after a change.",
                    (Query("count by (revision) (headgate_config_revision_info)", "{{revision}}"),),
                    "short",
                ),
            ),
        ),
    ),
)  # fmt: skip

SHARDS: Final = Dashboard(
    "headgate-shards",
    "Headgate: shards",
    "Who collects what, whether they keep up, and how AWS treats them.",
    (
        Row(
            "Slots",
            (
                Panel("Live shards", "Members of the exporters' group.", (Query("count(max by (shard) (headgate_shard_slots))"),), "short", "stat", 4, 7),
                Panel("Slots without a shard", "What is in them is not collected.", (Query("max(headgate_slots_unowned)"),), "short", "stat", 4, 7, _RED_ABOVE_0),
                Panel("Slots by shard", "As the group has them.", (Query("max by (shard) (headgate_shard_slots)", "{{shard}}"),), "short", stacked=True),
                Panel("Weight by shard", "Metrics asked a minute. Lines far apart: new weights move slots each ten minutes.", (Query("max by (shard) (headgate_shard_weight)", "{{shard}}"),)),
                Panel(
                    "Moves",
                    "Slots that a newer assignment gave to another shard, and rebalances that shards asked for. Without end: a shard starves.",
                    (
                        Query("max(increase(headgate_slots_moved_total[10m]))", "slots moved in 10 min"),
                        Query("sum(increase(headgate_rejoins_total[10m]))", "rejoins in 10 min"),
                    ),
                ),
                Panel("Targets", "In the configuration.", (Query("max(headgate_targets)", "targets"),)),
                Panel("Memory full", "Points that the memory of what was published has no room for: they are published at each look. Rising: add shards.", (Query("sum by (instance) (rate(headgate_points_not_remembered_total[$__rate_interval]))", "{{instance}}"),), "cps"),
            ),
        ),
        Row(
            "Work",
            (
                Panel("Tasks waiting", "Of each exporter. It reaches 0 between two polls, or the shard falls behind.", (Query("headgate_tasks_waiting", "{{instance}}"),)),
                Panel("Tasks being executed", "At tasks_in_flight all the time, with the CPU idle: raise it.", (Query("headgate_tasks_in_flight", "{{instance}}"),)),
                Panel("A task takes", "95 of 100 are done by then.", (Query("histogram_quantile(0.95, sum by (le, instance) (rate(headgate_task_seconds_bucket[$__rate_interval])))", "{{instance}}"),), "s", steps=((300, "red"),)),
                Panel("CPU", "Of each worker, in cores.", (Query(f"rate(process_cpu_seconds_total[$__rate_interval]) {_OURS}", "{{instance}}"),), "short"),
                Panel("Memory", "Of each worker.", (Query(f"process_resident_memory_bytes {_OURS}", "{{instance}}"),), "bytes"),
                Panel("Archive refuses for", "0: it took what it was given last.", (Query("headgate_archive_refusing_seconds", "{{instance}}"),), "s", steps=((300, "red"),)),
            ),
        ),
        Row(
            "AWS",
            (
                Panel("Requests", "To AWS, by API, retries included.", (Query('sum by (api) (rate(headgate_aws_requests_total{account=~"$account",region=~"$region"}[$__rate_interval]))', "{{api}}"),), "reqps"),
                Panel(
                    "Throttled",
                    "The ten accounts, regions and APIs of which AWS throttles the most. Above 10 %: the quota is less than configured, or others use it.",
                    (
                        Query(
                            'topk(10, sum by (account, region, api) (rate(headgate_aws_throttled_total{account=~"$account",region=~"$region"}[15m])) '
                            '/ sum by (account, region, api) (rate(headgate_aws_requests_total{account=~"$account",region=~"$region"}[15m])))',
                            "{{account}} {{region}} {{api}}",
                        ),
                    ),
                    "percentunit", "bargauge", steps=((0.01, "orange"), (0.1, "red")), highest=1,
                ),
                Panel("Credentials of another account", "Nothing of these is collected. Empty is good.", (Query("max by (account) (headgate_identity_mismatch)"),), kind="table"),
            ),
        ),
    ),
    (Variable("account", "Account", "headgate_aws_requests_total"), Variable("region", "Region", "headgate_aws_requests_total")),
)  # fmt: skip

COST: Final = Dashboard(
    "headgate-cost",
    "Headgate: cost",
    "Dollars of AWS's metrics API against budgets, what budgets do to polls, and what the store takes.",
    (
        Row(
            "All accounts",
            (
                Panel("Today", "Billed this UTC day, what is in doubt included.", (Query('max(headgate_spend_usd_today{account="all"})'),), "currencyUSD", "stat", 4, 7),
                Panel("By midnight UTC", "If polls go on as they do.", (Query('max(headgate_spend_forecast_usd_today{account="all"})'),), "currencyUSD", "stat", 4, 7),
                Panel(
                    "Against the budget",
                    "What was spent, what it will be by midnight, and what it may be.",
                    (
                        Query('max(headgate_spend_usd_today{account="all"})', "spent"),
                        Query('max(headgate_spend_forecast_usd_today{account="all"})', "by midnight"),
                        Query('max(headgate_budget_usd{account="all"})', "budget"),
                    ),
                    "currencyUSD",
                ),
                Panel("Healing", "Dollars of today that healing has spent or reserved; at heal.usd_per_day gaps wait for tomorrow.", (Query("max(headgate_heal_dollars_reserved)", "healing"),), "currencyUSD"),
            ),
        ),
        Row(
            "By account",
            (
                Panel("Dearest today", "The ten accounts that have cost most.", (Query('topk(10, max by (account) (headgate_spend_usd_today{account=~"$account",account!="all"}))', "{{account}}"),), "currencyUSD", "bargauge"),
                Panel("Nearest to their budgets", "Forecast over budget. At 1 polls are stretched, or will be.", (Query('topk(10, max by (account) (headgate_spend_forecast_usd_today{account=~"$account"}) / max by (account) (headgate_budget_usd))', "{{account}}"),), "percentunit", "bargauge", steps=((0.9, "orange"), (1.0, "red"))),
                Panel("Polls stretched", "Intervals that became one, for a budget; 0: stopped until midnight UTC. Empty is good.", (Query('max by (account, service) (headgate_poll_stretch{account=~"$account"})'),), kind="table"),
                Panel("Metrics billed", "A minute, the ten accounts with most.", (Query('topk(10, sum by (account) (rate(headgate_metrics_billed_total{account=~"$account"}[1h])) * 60)', "{{account}}"),), "short", "bargauge", width=12),
                Panel("Dearer than yesterday", "Today over yesterday at this time. Above 1.5: what is new?", (Query('topk(10, max by (account) (headgate_spend_usd_today{account=~"$account"}) / (max by (account) (headgate_spend_usd_today{account=~"$account"} offset 1d) > 0))', "{{account}}"),), "short", "bargauge", width=12, steps=((1.2, "orange"), (1.5, "red"))),
            ),
        ),
        Row(
            "The store",
            (
                Panel(
                    "Size",
                    "Of PostgreSQL's database, and what it may grow to (postgres.capacity_bytes; no line: it is not set).",
                    (Query("max by (sink) (headgate_store_bytes)", "{{sink}}"), Query("max by (sink) (headgate_store_capacity_bytes)", "{{sink}} may have")),
                    "bytes", width=12,
                ),
                Panel("In a week", "At the growth of the last four days.", (Query("predict_linear((max by (sink) (headgate_store_bytes))[4d:1h], 7 * 86400)", "{{sink}}"),), "bytes", "stat", 6),
                Panel("Full", "Of what it may have.", (Query("max by (sink) (headgate_store_bytes) / max by (sink) (headgate_store_capacity_bytes)", "{{sink}}"),), "percentunit", "stat", 6, steps=((0.7, "orange"), (0.9, "red"))),
            ),
        ),
    ),
    (Variable("account", "Account", "headgate_spend_usd_today"),),
    "2d",
)  # fmt: skip

COMPLETENESS: Final = Dashboard(
    "headgate-completeness",
    "Headgate: completeness",
    "Which windows are open, why, what healing does about them, and how late points come.",
    (
        Row(
            "Windows",
            (
                Panel("Open", "By reason. in_time: the deadline has not passed. `headgate gaps` lists the rest.", (Query("max by (reason) (headgate_open_windows)", "{{reason}}"),), "short", stacked=True),
                Panel("Past their deadline", "Without those that are in time or paused.", (Query('max by (reason) (headgate_open_windows{reason!~"in_time|paused"})', "{{reason}}"),), "short", stacked=True, steps=_RED_ABOVE_0),
                Panel("Oldest open window", "CloudWatch keeps one-minute points for 15 days.", (Query("max(headgate_oldest_open_window_seconds)", "age"),), "s", steps=((604_800, "red"),)),
                Panel("Sealed", "Windows whose rows, read back, are what was collected.", (Query("sum(rate(headgate_windows_sealed_total[$__rate_interval])) * 60", "a minute"),)),
                Panel("Unbalanced", "Readings back that differ from the receipt, in an hour. Rows are missing, or changed.", (Query("sum(increase(headgate_windows_unbalanced_total[1h]))", "in an hour"),), "short", steps=_RED_ABOVE_0),
                Panel("Given up", "Windows declared in an hour, by reason. Each is a hole that stays.", (Query("sum by (reason) (increase(headgate_windows_declared_total[1h]))", "{{reason}}"),), "short", steps=_RED_ABOVE_0),
            ),
        ),
        Row(
            "Healing",
            (
                Panel("Tasks", "In an hour. replay and again cost nothing; source is paid for.", (Query("sum by (means) (increase(headgate_heals_total[1h]))", "{{means}}"),), "short", stacked=True),
                Panel("Waiting", "Windows about which nothing is done now, and why.", (Query("max by (why) (headgate_heal_windows_waiting)", "{{why}}"),), "short", stacked=True),
                Panel("Dollars", "Spent or reserved today.", (Query("max(headgate_heal_dollars_reserved)", "healing"),), "currencyUSD"),
            ),
        ),
        Row(
            "Freshness",
            (
                Panel("Stalest targets", "Age of their newest landed window.", (Query("topk(10, max by (target) (headgate_target_freshness_seconds))", "{{target}}"),), "s", "bargauge", 12, steps=((1800, "orange"), (3600, "red"))),
                Panel("Targets by freshness", "Half, and all but one in a hundred, are fresher.", (Query("quantile(0.5, max by (target) (headgate_target_freshness_seconds))", "half"), Query("quantile(0.99, max by (target) (headgate_target_freshness_seconds))", "99 of 100")), "s", width=12),
                Panel("Points come after", "By service, 99 of 100 points have come by then (a week's looks). Beyond the settling time: `headgate settle`.", (Query("histogram_quantile(0.99, max by (service, le) (headgate_points_late_seconds_bucket))", "{{service}}"),), "s", "bargauge", 12),
                Panel("Points change until", "By service, 99 of 100 changes have come by then.", (Query("histogram_quantile(0.99, max by (service, le) (headgate_points_revised_seconds_bucket))", "{{service}}"),), "s", "bargauge", 12),
            ),
        ),
        Row(
            "Accounts",
            (
                Panel("In the organization's list", "As last known.", (Query("max(headgate_organization_accounts)", "accounts"),), "short", width=12),
                Panel("Age of the list", "Usual is a quarter of an hour.", (Query("max(headgate_organization_list_age_seconds)", "age"),), "s", width=12, steps=((14_400, "red"),)),
            ),
        ),
    ),
    span="24h",
)  # fmt: skip

_RECEIVER: Final = 'receiver=~"$receiver"'
REMOTE_WRITE: Final = Dashboard(
    "headgate-remote-write",
    "Headgate: remote write",
    "What goes to Prometheus: by receiver how much, how late, what is refused.",
    (
        Row(
            "Receivers",
            (
                Panel("Fails", "1: the last attempt did. Its samples wait in Kafka.", (Query(f"max by (receiver) (headgate_remote_write_failing{{{_RECEIVER}}})", "{{receiver}}"),), "short", steps=_RED_ABOVE_0),
                Panel("Records waiting", "On Kafka. It falls to nothing between two polls.", (Query(f"sum by (receiver) (headgate_remote_write_lag_records{{{_RECEIVER}}})", "{{receiver}}"),)),
                Panel("Samples taken", "By each receiver.", (Query(f"sum by (receiver) (rate(headgate_remote_write_samples_total{{{_RECEIVER}}}[$__rate_interval]))", "{{receiver}}"),), "cps", stacked=True),
                Panel("Refused", "too_old, out_of_order, changed: by ourselves, for the receiver would. Else in its words, in the dead letters.", (Query(f"sum by (receiver, reason) (rate(headgate_remote_write_refused_total{{{_RECEIVER}}}[$__rate_interval]))", "{{receiver}} {{reason}}"),), "cps", stacked=True),
                Panel(
                    "Samples come after",
                    "From the time that a sample carries to its being taken. A service's settling time is in it where the receiver has no out-of-order window.",
                    (
                        Query(f"histogram_quantile(0.5, sum by (le, receiver) (rate(headgate_remote_write_delay_seconds_bucket{{{_RECEIVER}}}[$__rate_interval])))", "{{receiver}} half"),
                        Query(f"histogram_quantile(0.99, sum by (le, receiver) (rate(headgate_remote_write_delay_seconds_bucket{{{_RECEIVER}}}[$__rate_interval])))", "{{receiver}} 99 of 100"),
                    ),
                    "s",
                ),
                Panel("A request takes", "95 of 100. Above a second: the receiver is slow.", (Query(f"histogram_quantile(0.95, sum by (le, receiver) (rate(headgate_remote_write_request_seconds_bucket{{{_RECEIVER}}}[$__rate_interval])))", "{{receiver}}"),), "s", steps=((1, "orange"), (10, "red"))),
                Panel("Samples held", "Until they settle. At the cap (remote_write.hold_bytes_max) Kafka is not read on.", (Query(f"sum by (receiver) (headgate_remote_write_held_samples{{{_RECEIVER}}})", "{{receiver}}"),), "short", stacked=True),
                Panel("Series known", "About a kilobyte of memory each. More than fit: another remote writer.", (Query(f"sum by (receiver) (headgate_remote_write_series{{{_RECEIVER}}})", "{{receiver}}"),), "short", stacked=True),
                Panel("Records skipped", "Kafka had dropped them before the receiver had them, in an hour. Each is a hole.", (Query(f"sum by (receiver) (increase(headgate_remote_write_skipped_records_total{{{_RECEIVER}}}[1h]))", "{{receiver}}"),), "short", steps=_RED_ABOVE_0),
            ),
        ),
    ),
    (Variable("receiver", "Receiver", "headgate_remote_write_samples_total"),),
)  # fmt: skip

OWN: Final = (PIPELINE, SHARDS, COST, COMPLETENESS, REMOTE_WRITE)
