-- How late points come, and how late they change: by the UTC day of the window's start, and the age at which a look saw it.
CREATE TABLE settling (
    target   text NOT NULL,
    service  text NOT NULL,
    day      date NOT NULL,
    age_s    integer NOT NULL,                                 -- from the window's end to the look, rounded up to minutes
    appeared bigint NOT NULL,                                  -- points that no look before had
    changed  bigint NOT NULL,                                  -- other points of series that had changed in the window: no fewer than were revised
    PRIMARY KEY (target, service, day, age_s)
) WITH (fillfactor = 50);
