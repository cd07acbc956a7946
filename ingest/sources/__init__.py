"""Sources of metrics: `cloudwatch` and `exposition`. Each implements `ingest.ports.Source`."""
