"""Where samples land. Each implements `ingest.ports.Sink`."""
