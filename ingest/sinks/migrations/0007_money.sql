-- Money: every billed request by day, and how budgets stretch polls.

-- By the UTC day on which it was asked, and why. Added to in the transaction that inserts the look, so each receipt counts once.
CREATE TABLE charges (
    day              date NOT NULL,
    target           text NOT NULL,
    service          text NOT NULL,
    reason           text NOT NULL,                            -- ingest.charges.Reason
    looks            bigint NOT NULL,
    metrics_billed   bigint NOT NULL,                          -- queries of GetMetricData
    metrics_in_doubt bigint NOT NULL,                          -- asked for, and billed or not: only AWS knows
    list_metrics     bigint NOT NULL,                          -- ListMetrics requests
    puts             bigint NOT NULL,                          -- objects put into the archive, one a task
    look_metrics     bigint,                                   -- billed by the newest complete look
    look_at          timestamptz,                              -- and when that was finished
    asked_until      timestamptz,                              -- the end of the newest window that was asked for, or for which nobody is
    PRIMARY KEY (day, target, service, reason)
) WITH (fillfactor = 50);                                      -- today's rows change all day long: in place

-- What was paid before this migration. Tasks older than the ledger's retention are gone, and with them their reasons.
INSERT INTO charges (day, target, service, reason, looks, metrics_billed, metrics_in_doubt, list_metrics, puts)
SELECT day, target, service, reason, sum(looks), sum(metrics_billed), sum(metrics_in_doubt), sum(list_metrics), sum(puts) FROM (
    SELECT (l.finished_at AT TIME ZONE 'UTC')::date AS day, l.target, l.service,
        CASE WHEN t.kind IN ('live', 'backlog') THEN t.kind ELSE 'unknown' END AS reason,
        1 AS looks, l.metrics_billed, l.metrics_in_doubt, coalesce((l.requests->>'ListMetrics')::bigint, 0) AS list_metrics, 0 AS puts
    FROM looks AS l LEFT JOIN tasks AS t USING (task_id)
    UNION ALL SELECT day, target, service, 'unknown', looks, metrics_billed, metrics_in_doubt, list_metrics, 0 FROM look_days
) AS before GROUP BY 1, 2, 3, 4;

-- Polls that a budget makes rarer, or has stopped: as decided last.
CREATE TABLE stretches (
    account text NOT NULL,
    service text NOT NULL,
    stretch integer NOT NULL,                                  -- so many poll intervals become one
    was     integer NOT NULL,                                  -- before `since`
    stopped boolean NOT NULL,                                  -- by the hard cap, until midnight UTC
    since   timestamptz NOT NULL,
    PRIMARY KEY (account, service)
);

-- A window's deadline allows for the polls as they are stretched: settles_at, `stretch` times its length, and a grace.
ALTER TABLE windows ADD COLUMN stretch integer NOT NULL DEFAULT 1;
CREATE INDEX tasks_besides ON tasks (planned_at) WHERE kind NOT IN ('live', 'paused', 'budget');
