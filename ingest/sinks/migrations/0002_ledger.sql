-- The ledger: a projection of the `ledger` topic, and of what the sink itself says has landed.

-- Which slot holds a target, and its learned weight: the planner's memory.
CREATE TABLE targets (
    target     text PRIMARY KEY,               -- source/account/region
    slot       integer NOT NULL,
    weight     double precision NOT NULL,
    planned_at timestamptz NOT NULL
);

-- What was planned. Written from configuration and time before any work.
CREATE TABLE tasks (
    task_id         text PRIMARY KEY,
    target          text NOT NULL,
    config_revision text NOT NULL,
    tick            timestamptz NOT NULL,
    kind            text NOT NULL,
    attempt         integer NOT NULL,
    planned_at      timestamptz NOT NULL,
    expires_at      timestamptz,               -- NULL: never
    value           bytea NOT NULL             -- the task itself, so that it can be put on `collect` again
);
CREATE INDEX tasks_by_time ON tasks (planned_at);

-- What was done: one row per receipt and service. Two receipts of one task (it ran twice) are two rows: both were paid for.
CREATE TABLE looks (
    look_id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task_id        text NOT NULL,
    service        text NOT NULL,
    finished_at    timestamptz NOT NULL,
    target         text NOT NULL,
    shard          text NOT NULL,
    started_at     timestamptz NOT NULL,
    window_start   timestamptz NOT NULL,       -- [window_start, window_end) was asked for
    window_end     timestamptz NOT NULL,
    status         text NOT NULL,
    detail         text NOT NULL,
    observed_at    timestamptz,                -- the source's own clock; NULL where nothing answered
    series         integer NOT NULL,
    points         bigint NOT NULL,
    metrics_billed bigint NOT NULL,
    requests       jsonb NOT NULL,             -- API name → requests sent
    archive_key    text NOT NULL,
    batch_ids      bytea[] NOT NULL,
    windows        jsonb NOT NULL,             -- [[start_s, points, digest], …]; windows without points are left out
    landed_at      timestamptz,                -- every batch is in `landed`
    UNIQUE (task_id, service, finished_at)
);
CREATE INDEX looks_not_landed ON looks (look_id) WHERE landed_at IS NULL;
CREATE INDEX looks_by_time ON looks (finished_at);

-- One row per window: planned → collected → landed → sealed, or visibly open, with the last look's status and detail.
CREATE TABLE windows (
    target             text NOT NULL,
    service            text NOT NULL,
    window_start       timestamptz NOT NULL,
    window_end         timestamptz NOT NULL,
    settles_at         timestamptz NOT NULL,   -- a complete look at or after this time seals
    planned_at         timestamptz NOT NULL,
    last_status        text,                   -- of the newest receipt, complete or not
    last_detail        text,
    last_finished_at   timestamptz,
    collected_as_of    timestamptz,            -- observed_at of the newest complete look with a receipt
    landed_as_of       timestamptz,            -- observed_at of the newest complete look that has landed
    points             bigint,                 -- of that look
    digest             bigint,                 -- of that look's points in this window
    sealed_at          timestamptz,
    PRIMARY KEY (target, service, window_start)
);
CREATE INDEX windows_open ON windows (window_end) WHERE sealed_at IS NULL;
CREATE INDEX windows_planned ON windows (target, service, window_end DESC);
