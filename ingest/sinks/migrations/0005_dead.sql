-- What people decided about dead letters. The letters themselves stay in Kafka until its retention; an identity says which.
CREATE TABLE dead_handled (
    identity text PRIMARY KEY,                 -- ingest.model.DeadLetter.identity
    what     text NOT NULL CHECK (what IN ('replayed', 'discarded')),
    at       timestamptz NOT NULL,
    note     text NOT NULL                     -- of a replay its task, or record; of a discard the given reason
);
