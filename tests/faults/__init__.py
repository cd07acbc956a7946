"""Faults on the real servers: what is published (`truth`), what breaks it (`victim`, `proxy`), and what must hold after (`oracle`)."""
