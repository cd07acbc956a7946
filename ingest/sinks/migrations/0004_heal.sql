-- Healing: each time that the source is asked again for windows that are past their deadline.

-- Allocated by this insert before the task is announced, so that of two coordinators one gets it. Money is reserved here.
CREATE TABLE attempts (
    target       text NOT NULL,
    service      text NOT NULL,
    block_start  timestamptz NOT NULL,     -- of the epoch-aligned block that the windows lie in
    attempt      integer NOT NULL,
    task_id      text NOT NULL UNIQUE,
    window_start timestamptz NOT NULL,     -- [window_start, window_end) is asked for
    window_end   timestamptz NOT NULL,
    allocated_at timestamptz NOT NULL,
    reserved_usd numeric NOT NULL,
    value        bytea NOT NULL,           -- the task: it may have to be announced again
    PRIMARY KEY (target, service, block_start, attempt)
);
CREATE INDEX attempts_by_time ON attempts (allocated_at);

-- What was heard of a target last, and what of it has landed.
CREATE INDEX looks_of_target ON looks (target, finished_at);
