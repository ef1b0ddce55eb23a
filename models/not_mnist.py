"""notMNIST, the small set: 18,724 letters A to J in many typefaces, 28 x 28, every tenth of a letter a test image."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int, UInt8

from ssm_nn.models.cifar import ByteImages
from ssm_nn.models.downloads import DataError, DataFile, read_file

__all__ = ["not_mnist", "read_letters"]

FILE = DataFile(
    "notmnist/notMNIST_small.zip",
    md5="3de91fb69221d9c2d5c57387101ebc6c",
    mirrors=("https://zenodo.org/record/8274268/files/notMNIST_small.zip",),
)
LETTERS = "ABCDEFGHIJ"
SIDE, TESTED = 28, 10


def not_mnist(folder: str | Path | None = None) -> ByteImages:
    """Images (N, 28, 28), ink bright, with labels 0 to 9 for A to J.

    Args:
        folder: the only data folder to look in; None looks in SSM_NN_DATA, in the cache, and then downloads.

    Raises:
        DataError: a missing, damaged or unreachable file.
    """
    images, labels = read_letters(read_file(FILE, folder))
    number = np.concatenate([np.arange(count) for count in np.bincount(labels)])  # within a letter: these are in order
    tested = number % TESTED == 0
    return ByteImages(images[~tested], labels[~tested], images[tested], labels[tested])


def read_letters(packed: bytes) -> tuple[UInt8[np.ndarray, "n 28 28"], Int[np.ndarray, " n"]]:
    """The zip file of ``<letter>/<name>.png`` under one folder, letter by letter; images that are none are left out.

    Source: https://zenodo.org/records/8274268 (Bulatov 2011). Raises DataError for a file that is no such archive.
    """
    from PIL import Image, UnidentifiedImageError  # only needed where something is decoded

    images, labels = [], []
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            parts = {name: PurePosixPath(name).parent.name for name in archive.namelist() if name.endswith(".png")}
            for letter in LETTERS:
                for name in sorted(n for n, folder in parts.items() if folder == letter):
                    try:
                        with Image.open(io.BytesIO(archive.read(name)), formats=["PNG"]) as image:
                            pixels = np.asarray(image.convert("L"))
                    except (UnidentifiedImageError, OSError):  # two of the published files are empty
                        continue
                    if pixels.shape != (SIDE, SIDE):
                        raise DataError(f"content holds {name} of shape {pixels.shape}; (28, 28) is expected")
                    images.append(pixels)
                    labels.append(LETTERS.index(letter))
    except zipfile.BadZipFile as error:
        raise DataError(f"content is no zip file of notMNIST: {error}") from error
    if set(labels) != set(range(len(LETTERS))):
        raise DataError("content holds no images <letter>/<name>.png of every letter from A to J")
    return np.stack(images), np.array(labels, np.int32)
