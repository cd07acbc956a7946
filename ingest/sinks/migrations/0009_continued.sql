-- A bill can tell whether continuation pages are billed again, where the ledger knows how many there were.
ALTER TABLE charges ADD COLUMN metrics_continued bigint NOT NULL DEFAULT 0;   -- asked for again by continuation pages
