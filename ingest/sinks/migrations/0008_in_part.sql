-- Whether the look that a window is to be sealed on left out what was published before: then rows of any version may prove it.
ALTER TABLE windows ADD COLUMN in_part boolean NOT NULL DEFAULT false;
