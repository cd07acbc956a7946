"""What nodes of ElastiCache have, which no API says: vCPUs, and the memory for data (AWS's documentation of node types, November 2026).

A node has less memory than the instance type that it is called after, for part of that is the service's own. What is not here stays unknown:
report.prices may say a type's size.
"""

from __future__ import annotations

from typing import Final

GIB: Final = 1024**3

_VCPU: Final = {"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16, "8xlarge": 32, "12xlarge": 48, "16xlarge": 64, "24xlarge": 96}  # fmt: skip
_GENERAL: Final = {"large": 6.38, "xlarge": 12.93, "2xlarge": 26.04, "4xlarge": 52.26, "8xlarge": 103.68, "12xlarge": 157.12, "16xlarge": 209.55, "24xlarge": 314.32}  # fmt: skip
_MEMORY: Final = {"large": 13.07, "xlarge": 26.32, "2xlarge": 52.82, "4xlarge": 105.81, "8xlarge": 209.55, "12xlarge": 317.77, "16xlarge": 419.09, "24xlarge": 635.61}  # fmt: skip
_BURSTABLE: Final = {"micro": 0.5, "small": 1.37, "medium": 3.09}
_FIFTH: Final = ("large", "xlarge", "2xlarge", "4xlarge", "12xlarge", "24xlarge")
_GRAVITON: Final = ("large", "xlarge", "2xlarge", "4xlarge", "8xlarge", "12xlarge", "16xlarge")

NODES: Final[dict[str, tuple[int, int]]] = {
    f"cache.{family}.{size}": (_VCPU.get(size, 2), round(gib[size] * GIB))
    for families, sizes, gib in (
        (("t3", "t4g"), tuple(_BURSTABLE), _BURSTABLE),
        (("m5",), _FIFTH, _GENERAL),
        (("r5",), _FIFTH, _MEMORY),
        (("m6g", "m7g"), _GRAVITON, _GENERAL),
        (("r6g", "r7g"), _GRAVITON, _MEMORY),
    )
    for family in families
    for size in sizes
}
"""By node type: vCPUs, and bytes of memory for data, of one node."""
