"""Fixtures that every test may ask for, and settings which halve the time that the suite spends on compiling."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# No test opens a window.
os.environ.setdefault("MPLBACKEND", "Agg")

# Four fifths of a small test is XLA's compiling. What one test compiled, others and later runs read back; in the environment,
# so that the processes that tests start do likewise.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest

# A collection passes over everything that tests have traced, seconds at the end of the suite: an eighth of its time by default.
gc.set_threshold(100_000, 50, 100)

SEED = 20240229


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with the suite's seed, fresh for each test."""
    return np.random.default_rng(SEED)


@pytest.fixture
def key() -> jax.Array:
    """A JAX key with the suite's seed."""
    return jax.random.key(SEED)


@pytest.fixture
def x64() -> Iterator[None]:
    """The test runs in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def data_folder() -> Path:
    """The folder with the real data files; the test is skipped where there is none."""
    named = os.environ.get("SSM_NN_DATA")
    if not named:
        pytest.skip("SSM_NN_DATA is not set: it names the folder with the data files (mnist, uci, streams, ...)")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"SSM_NN_DATA names {named}, which is not a folder")
    return folder
