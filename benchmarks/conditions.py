"""Where a benchmark was run, in words for its table."""

from __future__ import annotations

import os
import platform

import jax

__all__ = ["machine"]


def machine() -> str:
    """Device, cores, processor and version of JAX."""
    device = jax.devices()[0]
    return (
        f"{device.platform} {device.device_kind}, {os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}"
    )
