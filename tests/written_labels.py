"""Labels of remote write, read back as a receiver reads them."""

from __future__ import annotations

from ingest.ports import EncodedLabels, LabelSet
from ingest.sinks.prompb import TimeSeries


def decoded_labels(labels: EncodedLabels) -> LabelSet:
    """The inverse of `ingest.sinks.prompb.encoded_labels`."""
    return tuple((label.name, label.value) for label in TimeSeries.FromString(labels).labels)
