"""The way of the data, one stage per file: schedule, sources, wire, archive, log, validate, sinks, ledger."""
