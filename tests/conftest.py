"""Fixtures that every test may ask for."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

# No test opens a window.
os.environ.setdefault("MPLBACKEND", "Agg")

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
