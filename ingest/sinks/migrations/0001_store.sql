-- The store: series, samples, and what makes landing idempotent. Never edit an applied migration; add one.

CREATE TABLE series (
    id         uuid PRIMARY KEY,         -- ingest.model.series_id: 128 bits of blake2b over the labels
    account    text NOT NULL,
    region     text NOT NULL,
    namespace  text NOT NULL,
    metric     text NOT NULL,
    dimensions jsonb NOT NULL,           -- an object, name to value
    stat       text NOT NULL,
    period_s   integer NOT NULL,
    unit       text NOT NULL,
    first_seen timestamptz NOT NULL
);

CREATE INDEX series_labels ON series (account, region, namespace, metric);

-- A partition a UTC day (ingest.sinks.postgres creates them). The key has time first: rows arrive in time's order, so
-- that inserts stay in the right-hand leaves of the index. version is ingest.model.version_of; of two samples with one
-- key the greater (version, value) stays.
CREATE TABLE samples (
    ts      timestamptz NOT NULL,
    series  uuid NOT NULL,
    value   double precision NOT NULL,
    version bigint NOT NULL,
    PRIMARY KEY (ts, series)
) PARTITION BY RANGE (ts);

-- Where a sink goes on in a partition of a Kafka topic, and which backend of this server writes for its owner.
CREATE TABLE positions (
    sink          text NOT NULL,
    topic         text NOT NULL,
    partition     integer NOT NULL,
    next          bigint NOT NULL,
    last_value_id bytea NOT NULL,        -- blake2b-128 of the value of record next - 1; empty at position 0
    backend_pid   integer,
    backend_start timestamptz,
    PRIMARY KEY (sink, topic, partition)
);

-- What has landed, a row a batch. Insert-only: nothing here is hot, the ledger folds it.
CREATE TABLE landed (
    sink        text NOT NULL,
    batch_id    bytea NOT NULL,
    task_id     text NOT NULL,
    target      text NOT NULL,           -- source/account/region
    service     text NOT NULL,
    version     bigint NOT NULL,
    points      integer NOT NULL,
    dead_points integer NOT NULL,        -- of the same batch, put aside by validation
    digest      bigint NOT NULL,         -- ingest.model.digest_of the points, in two's complement
    landed_at   timestamptz NOT NULL,
    PRIMARY KEY (sink, batch_id)
);

CREATE INDEX landed_task ON landed (task_id);
