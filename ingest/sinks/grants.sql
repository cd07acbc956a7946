-- What Headgate's roles may do with its tables: applied by each `headgate setup`, after the migrations, where docs/postgres-roles.sql has made the roles.

-- Partitions are made and dropped by who lands: they, and the tables they belong to, are owned by a role that consumers are in.
DO $$
DECLARE it regclass;
BEGIN
    FOR it IN
        SELECT c.oid FROM pg_class c WHERE c.relowner <> 'headgate_partitions'::regrole AND c.oid IN (
            SELECT unnest(ARRAY['samples', 'rollup_hours', 'rollup_days'])::regclass
            UNION ALL SELECT inhrelid FROM pg_inherits
                WHERE inhparent IN ('samples'::regclass, 'rollup_hours'::regclass, 'rollup_days'::regclass))
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO headgate_partitions', it);
    END LOOP;
    FOR it IN
        SELECT oid FROM pg_class
        WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v') AND NOT relispartition
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO headgate_viewer', it);
    END LOOP;
END $$;

GRANT INSERT ON series TO headgate_consumer;
GRANT UPDATE ON positions TO headgate_consumer;
GRANT INSERT, UPDATE, DELETE ON
    landed, tasks, looks, windows, sealed_days, declared_days, look_days, charges, settling, rollup_marks
TO headgate_consumer;

-- Healing declares windows, and takes back that a look had landed.
GRANT UPDATE ON windows, looks TO headgate_coordinator;
GRANT DELETE ON landed TO headgate_coordinator;
GRANT INSERT, UPDATE, DELETE ON attempts, targets, stretches, inventory, inventory_looks TO headgate_coordinator;

GRANT INSERT, UPDATE, DELETE ON positions, pauses, dead_handled, inventory, inventory_looks TO headgate_operator;
