-- Rollups: hours and days of samples. A row holds a bucket of series, 1/256 of all ids, in arrays of one length: one row replaces
-- what a piece of work computes, and reading takes a fifth of the time of rows. See docs/decisions/0027-rollups.md.

CREATE FUNCTION rollup_bucket(series uuid) RETURNS smallint
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE RETURN get_byte(uuid_send(series), 0)::smallint;

CREATE TABLE rollup_hours (
    bucket      smallint NOT NULL,             -- rollup_bucket of its series
    start       timestamptz NOT NULL,
    computed_at timestamptz NOT NULL,          -- all that had landed by then is in it; what landed later has a mark
    series      uuid[] NOT NULL,               -- ascending
    count       integer[] NOT NULL,            -- samples, never filled up
    sum         double precision[] NOT NULL,
    min         double precision[] NOT NULL,
    max         double precision[] NOT NULL,
    p50         double precision[] NOT NULL,   -- exact, linear between the two nearest values
    p95         double precision[] NOT NULL,
    p99         double precision[] NOT NULL,
    PRIMARY KEY (bucket, start)
) PARTITION BY RANGE (start);

-- percentiles are NaN where samples had been dropped before the day was rolled up. sketches: ingest.rollups.Bins.pack.
CREATE TABLE rollup_days (LIKE rollup_hours INCLUDING ALL, sketches bytea NOT NULL) PARTITION BY RANGE (start);

-- What to roll up: a bit a bucket whose samples of that hour, or rows of that day's hours, have changed. Landing appends one row an
-- hour that it touches; rows are folded and removed by who rolls up.
CREATE TABLE rollup_marks (
    span_s    integer NOT NULL,                -- 3600 or 86400
    start     timestamptz NOT NULL,
    id        bigint GENERATED ALWAYS AS IDENTITY,
    buckets   bit(256) NOT NULL,
    marked_at timestamptz NOT NULL,            -- the oldest change
    PRIMARY KEY (span_s, start, id)
);

CREATE VIEW rollups_hourly AS
SELECT r.start AS ts, r.bucket, u.series, u.count, u.sum, u.min, u.max, u.sum / u.count AS average, u.p50, u.p95, u.p99
FROM rollup_hours AS r, unnest(r.series, r.count, r.sum, r.min, r.max, r.p50, r.p95, r.p99)
    AS u (series, count, sum, min, max, p50, p95, p99);

CREATE VIEW rollups_daily AS
SELECT r.start AS ts, r.bucket, u.series, u.count, u.sum, u.min, u.max, u.sum / u.count AS average, u.p50, u.p95, u.p99
FROM rollup_days AS r, unnest(r.series, r.count, r.sum, r.min, r.max, r.p50, r.p95, r.p99)
    AS u (series, count, sum, min, max, p50, p95, p99);

-- What is there already, an hour from now: by then no consumer of the version before lands without marks.
INSERT INTO rollup_marks (span_s, start, buckets, marked_at)
SELECT 3600, to_timestamp(substr(c.relname, 9) || '+00', 'YYYYMMDDTZH') + n * interval '1 hour',
    repeat('1', 256)::bit(256), now() + interval '1 hour'
FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid, generate_series(0, 23) AS n
WHERE i.inhparent = 'samples'::regclass AND c.relname ~ '^samples_\d{8}$';
