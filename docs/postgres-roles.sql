-- Roles for Headgate's parts: run once, in Headgate's database, by who may create roles; again changes nothing. Then give each part a user of its own:
--
--   CREATE ROLE headgate_setup_user LOGIN PASSWORD '…' IN ROLE headgate_setup;
--   CREATE ROLE headgate_consumer_user LOGIN PASSWORD '…' IN ROLE headgate_consumer;         -- one for all consumers: a new owner ends what another left
--   CREATE ROLE headgate_coordinator_user LOGIN PASSWORD '…' IN ROLE headgate_coordinator;
--   CREATE ROLE alice LOGIN PASSWORD '…' IN ROLE headgate_operator;                          -- backfill, pause, dead, positions, inventory import
--   CREATE ROLE grafana LOGIN PASSWORD '…' IN ROLE headgate_viewer;                          -- status, gaps, report, audit, samples, why, cost
--
-- Where Headgate runs with one user already: GRANT headgate_setup TO that user, and go on with it for `headgate setup`.
-- `headgate setup` grants on the tables, at each run, what ingest/sinks/grants.sql says. docs/decisions/0032-roles.md says why so.

DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['headgate_setup', 'headgate_partitions', 'headgate_consumer', 'headgate_coordinator', 'headgate_operator', 'headgate_viewer'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', name);
        END IF;
    END LOOP;
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    -- Temporary tables are what rows are staged in.
    EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO headgate_setup, headgate_viewer', current_database());
END $$;

-- Who changes something looks, too; and what a backfill lands is landed as a consumer does it.
GRANT headgate_viewer TO headgate_consumer, headgate_coordinator, headgate_operator;
GRANT headgate_consumer TO headgate_operator;

-- It owns samples and rollups, so that who lands can add the partition of a new day and drop that of an old one. Nothing else.
GRANT headgate_partitions TO headgate_setup, headgate_consumer;

REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO headgate_setup, headgate_partitions;
GRANT USAGE ON SCHEMA public TO headgate_viewer;
