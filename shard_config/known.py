"""What is known before any configuration is read: AWS's regions, and the service profiles that Headgate ships. No network."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources

from botocore.loaders import Loader

from shard_config.document import ConfigError, ConfigErrors, parse
from shard_config.model import ServiceProfile


@functools.cache
def known_regions() -> frozenset[str]:
    """The regions of all partitions that have CloudWatch, from botocore's data files."""
    partitions = Loader().load_data("endpoints")["partitions"]
    # Without the intersection FIPS endpoints such as fips-us-east-1 would pass for regions.
    return frozenset(
        region
        for partition in partitions
        for region in partition["services"].get("monitoring", {}).get("endpoints", {})
        if region in partition["regions"]
    )


@functools.cache
def shipped_documents() -> Mapping[str, dict[str, object]]:
    """The files in shard_config/services as they stand there, by service. Raises ConfigErrors, or what parsing raises."""
    folder = resources.files("shard_config") / "services"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    errors: list[ConfigError] = []
    found = {}
    for file in files:
        root = parse(file.read_text(encoding="utf-8"), file.name, errors)
        found[file.name.removesuffix(".yaml")] = {key: node.plain() for key, node in root.mapping.items()}
    if errors:
        raise ConfigErrors(errors)
    return found


@functools.cache
def shipped_services() -> Mapping[str, ServiceProfile]:
    """The profiles in shard_config/services, by service."""
    return {
        name: ServiceProfile.model_validate_json(json.dumps(document))
        for name, document in shipped_documents().items()
    }
