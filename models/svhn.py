"""Street View House Numbers, cropped digits: 73,257 training and 26,032 test images of 32 x 32 x 3, from the original files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from ssm_nn.models.cifar import SIDE, ByteImages
from ssm_nn.models.downloads import DataError, DataFile, read_file

__all__ = ["read_mat", "svhn"]

_ADDRESS = "http://ufldl.stanford.edu/housenumbers"
TRAIN_FILE, TEST_FILE = (
    DataFile(f"svhn/{name}", size=size, md5=md5, mirrors=(f"{_ADDRESS}/{name}",))
    for name, size, md5 in (
        ("train_32x32.mat", 182040794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
        ("test_32x32.mat", 64275384, "eb5a983be6a315427106f1b164d9cef3"),
    )
)


def svhn(folder: str | Path | None = None) -> ByteImages:
    """Both parts; the label is the digit.

    Args:
        folder: the only data folder to look in; None looks in SSM_NN_DATA, in the cache, and then downloads.

    Raises:
        DataError: a missing, damaged or unreachable file.
    """
    return ByteImages(*read_mat(read_file(TRAIN_FILE, folder)), *read_mat(read_file(TEST_FILE, folder)))


def read_mat(content: bytes) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int[np.ndarray, " n"]]:
    """A MATLAB file with ``X`` (32, 32, 3, N) and ``y`` (N, 1), in which 10 stands for the digit 0.

    Source: http://ufldl.stanford.edu/housenumbers. Raises DataError where the content is something else.
    """
    from scipy.io import loadmat  # slow to import, and only needed here

    try:
        arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        images, labels = np.asarray(arrays["X"]), np.asarray(arrays["y"]).ravel()
    except Exception as error:  # scipy raises whatever it met
        raise DataError(f"content is no MATLAB file with X and y ({type(error).__name__}: {error})") from error
    if images.dtype != np.uint8 or images.shape != (SIDE, SIDE, 3, len(labels)):
        raise DataError(
            f"content holds X {images.dtype} {images.shape} and {len(labels)} labels; uint8 (32, 32, 3, N) is SVHN"
        )
    if not np.isin(labels, np.arange(1, 11)).all():
        raise DataError(f"content holds the labels {np.unique(labels).tolist()[:12]}; SVHN has 1 to 10")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), (labels % 10).astype(np.int32)
