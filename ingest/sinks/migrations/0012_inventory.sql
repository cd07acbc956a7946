-- What resources there were, and what they were like: a row for each span of time in which nothing about a resource changed.
CREATE TABLE inventory (
    account    text NOT NULL,
    region     text NOT NULL,
    service    text NOT NULL,
    id         text NOT NULL,                                  -- the value of the dimension that its metrics have
    since      timestamptz NOT NULL,
    until      timestamptz,                                    -- NULL: as far as is known it is still so
    seen       timestamptz NOT NULL,                           -- the look that saw it so first
    born       timestamptz NOT NULL,                           -- of its first span; the epoch: nobody knows
    attributes jsonb NOT NULL,                                 -- type, sizes, state, tags: ingest.inventory.model
    PRIMARY KEY (account, region, service, id, since),
    CHECK (until > since)
);
CREATE UNIQUE INDEX inventory_now ON inventory (account, region, service, id) WHERE until IS NULL;

-- What is known of each scope, and how the last look at it went.
CREATE TABLE inventory_looks (
    account    text NOT NULL,
    region     text NOT NULL,
    service    text NOT NULL,
    source     text NOT NULL,
    first_at   timestamptz,                                    -- the first whole look
    whole_at   timestamptz,                                    -- the last whole look
    tried_at   timestamptz NOT NULL,
    failure    text NOT NULL DEFAULT '',                       -- of the last look; empty: it was whole
    lacks      text[] NOT NULL DEFAULT '{}',                   -- what the last whole look did without
    PRIMARY KEY (account, region, service)
);
