-- A look publishes what is new or changed; what else it saw of windows that it may seal is archived, and counted here.
ALTER TABLE looks
    ADD COLUMN whole jsonb,                                    -- [[start_s, points, digest], …], published and held together; NULL: windows has all
    ADD COLUMN held_ids bytea[] NOT NULL DEFAULT '{}',         -- batches that are archived and were not published
    ADD COLUMN metrics_in_doubt bigint NOT NULL DEFAULT 0;     -- of requests whose answer was lost: billed or not, only AWS knows
ALTER TABLE look_days ADD COLUMN metrics_in_doubt bigint NOT NULL DEFAULT 0;
