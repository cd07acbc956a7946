"""aiobotocore sessions that share what botocore reads from its files: 0.3 s of CPU and 8 MB each, where every session reads for itself."""

from __future__ import annotations

from functools import cache
from typing import Any

from aiobotocore.session import AioSession


@cache
def _service_models() -> Any:
    """botocore's loader, which is only read from."""
    return AioSession().get_component("data_loader")


def new_session() -> AioSession:
    """A session of its own in all but the service models."""
    session = AioSession()
    session.register_component("data_loader", _service_models())
    return session
