-- The ledger proves: windows are sealed on the store's own rows, then folded by day; what is older than its retention goes.

-- The sum of digests (ingest.model: modulo 2**64) as a bigint in two's complement.
CREATE FUNCTION digest_sum(total numeric) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (CASE WHEN m >= 9223372036854775808 THEN m - 18446744073709551616 ELSE m END)::bigint
    FROM (SELECT mod(mod(total, 18446744073709551616) + 18446744073709551616, 18446744073709551616) AS m) AS wrapped
$$;

-- Points that validation or the sink put aside, by window: [[start_s, points, digest], …], to be taken off what the receipt says.
ALTER TABLE landed ADD COLUMN dead_windows jsonb;              -- NULL: none
CREATE INDEX landed_by_time ON landed USING brin (landed_at) WITH (autosummarize = on);

ALTER TABLE looks ADD COLUMN grid_s integer;                   -- length of its windows; NULL: from before this migration

-- An open window has neither sealed_at nor declared. points and digest are what the store must hold of the newest landed look.
ALTER TABLE windows
    ADD COLUMN attempts integer NOT NULL DEFAULT 0,            -- looks with a receipt
    ADD COLUMN declared text,                                  -- closed without data: forbidden, expired, abandoned, unrecoverable
    ADD COLUMN declared_at timestamptz,
    ADD COLUMN landed_version bigint,                          -- the least version of that look's rows
    ADD COLUMN dead_points bigint NOT NULL DEFAULT 0,          -- of that look in this window, put aside
    ADD COLUMN checked_at timestamptz,                         -- when the store's rows were last held against that look
    ADD COLUMN unbalanced text;                                -- how they differed then; NULL: they did not

DROP INDEX windows_open;
CREATE INDEX windows_open ON windows (window_end) WHERE sealed_at IS NULL AND declared IS NULL;
CREATE INDEX windows_closed ON windows (greatest(sealed_at, declared_at)) WHERE sealed_at IS NOT NULL OR declared IS NOT NULL;

-- Before this migration a seal was the receipts' word alone: those windows are sealed again, on the store's.
UPDATE windows SET sealed_at = NULL;
UPDATE windows SET settles_at = window_start WHERE target LIKE 'exposition/%';
UPDATE looks SET landed_at = NULL WHERE status = 'complete';

-- Sealed and declared windows, folded: a row per target, service and UTC day of the window's start.
CREATE TABLE sealed_days (
    target           text NOT NULL,
    service          text NOT NULL,
    day              date NOT NULL,
    windows          integer NOT NULL,                         -- sealed, and closed without data
    declared_windows integer NOT NULL DEFAULT 0,               -- closed without data
    points           bigint NOT NULL,
    digest           bigint NOT NULL,                          -- digest_sum of the windows'
    first_start      timestamptz NOT NULL,
    last_end         timestamptz NOT NULL,
    sealed_at        timestamptz NOT NULL,                     -- of the last that was closed
    version          bigint NOT NULL DEFAULT 0,                -- the greatest landed_version: a look above it opens its windows again
    relooked_at      timestamptz,                              -- folded windows were looked at again: points and digest are from before
    covered          tstzmultirange NOT NULL,                  -- exactly the folded windows
    PRIMARY KEY (target, service, day)
);
CREATE INDEX sealed_days_by_day ON sealed_days (day);

-- Of those, the ones closed without data, by reason.
CREATE TABLE declared_days (
    target  text NOT NULL,
    service text NOT NULL,
    day     date NOT NULL,
    reason  text NOT NULL,
    covered tstzmultirange NOT NULL,
    PRIMARY KEY (target, service, day, reason)
);

-- What looks older than the ledger's retention did and cost, by the UTC day on which they finished: every billed request stays attributed.
CREATE TABLE look_days (
    target         text NOT NULL,
    service        text NOT NULL,
    day            date NOT NULL,
    looks          integer NOT NULL,
    complete       integer NOT NULL,
    points         bigint NOT NULL,
    metrics_billed bigint NOT NULL,
    list_metrics   bigint NOT NULL,                            -- ListMetrics requests
    PRIMARY KEY (target, service, day)
);

-- What is planned and shown, but neither asked nor healed. '*' stands for all.
CREATE TABLE pauses (
    account text NOT NULL,
    service text NOT NULL,
    since   timestamptz NOT NULL,
    reason  text NOT NULL,
    PRIMARY KEY (account, service)
);
