"""Tiny ImageNet: 200 classes, 500 training and 50 test images of 64 x 64 each, out of the archive as it is published.

The test images are the archive's validation images: its own test images have no labels. Source: the Stanford course CS231n,
whose images are those of ImageNet (Deng et al. 2009), for research only.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssm_nn.models.cifar100 import own_heads
from ssm_nn.models.datasets import Dataset
from ssm_nn.models.downloads import DataError, DataFile, read_file
from ssm_nn.models.task_streams import TaskStream

__all__ = ["read_archive", "tiny_imagenet", "tiny_imagenet_split"]

FILE = DataFile(
    "tiny-imagenet/tiny-imagenet-200.zip",
    md5="90528d7ca1a48142e341f4ef8d21d0de",
    mirrors=("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
)
SIDE = 64


def tiny_imagenet(folder: str | Path | None = None) -> Dataset:
    """All 200 classes, float32 in [0, 1] of shape (N, 64, 64, 3); labels in the order of the classes' identifiers.

    Args:
        folder: the only data folder to look in; None looks in SSM_NN_DATA, in the cache, and then downloads.

    Raises:
        DataError: a missing, damaged or unreachable file.
    """
    return read_archive(read_file(FILE, folder))


def read_archive(packed: bytes) -> Dataset:
    """``train/<class>/images/*.JPEG``, ``val/images/*.JPEG`` with ``val/val_annotations.txt``, under one folder.

    Raises DataError for a file that is no such archive.
    """
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            notes: dict[str, str] = {}
            for name in archive.namelist():
                if name.endswith("val/val_annotations.txt"):
                    lines = archive.read(name).decode("utf-8").splitlines()
                    notes = {line.split("\t")[0]: line.split("\t")[1] for line in lines if line}
            for name in sorted(n for n in archive.namelist() if n.endswith(".JPEG")):
                parts = name.split("/")
                if "train" in parts:
                    train.append((name, parts[-3]))
                elif "val" in parts:
                    if parts[-1] not in notes:
                        raise DataError(f"content holds {name}, of which val_annotations.txt says nothing")
                    test.append((name, notes[parts[-1]]))
            if not train or not test:
                raise DataError("content holds no images train/<class>/images/*.JPEG and val/images/*.JPEG")
            classes = sorted({label for _, label in train})
            train_x, test_x = (_decoded(archive, [name for name, _ in part]) for part in (train, test))
    except zipfile.BadZipFile as error:
        raise DataError(f"content is no zip file of Tiny ImageNet: {error}") from error
    strange = sorted({label for _, label in test} - set(classes))
    if strange:
        raise DataError(f"val_annotations.txt names {strange[0]}, of which there is no training image")
    train_y, test_y = (np.array([classes.index(label) for _, label in part], np.int32) for part in (train, test))
    source = "Tiny ImageNet (Stanford CS231n), images of ImageNet, for research only"
    return Dataset("tiny-imagenet", train_x, train_y, test_x, test_y, len(classes), source)


def _decoded(archive: zipfile.ZipFile, names: Sequence[str]) -> np.ndarray:
    from PIL import Image  # only needed where something is decoded

    values = np.empty((len(names), SIDE, SIDE, 3), np.float32)
    for number, name in enumerate(names):
        with Image.open(io.BytesIO(archive.read(name)), formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        if pixels.shape != values.shape[1:]:
            raise DataError(f"content holds {name} of shape {pixels.shape}; {values.shape[1:]} is expected")
        values[number] = pixels / np.float32(255)
    return values


def tiny_imagenet_split(
    num_tasks: int = 20, order: Sequence[int] | None = None, seed: int = 0, folder: str | Path | None = None
) -> TaskStream:
    """The classes dealt out in order, 200 / T to a task, with labels of the task's own.

    Args:
        num_tasks: T, a divisor of 200.
        order: a permutation of 0 .. T - 1; None is the natural order.
        seed: of the order of the examples.
        folder: as for ``tiny_imagenet``.

    Raises:
        DataError: a missing, damaged or unreachable file. ValueError: another argument out of range.
    """
    dataset = tiny_imagenet(folder)
    if num_tasks < 1 or dataset.num_classes % num_tasks:
        raise ValueError(f"num_tasks is {num_tasks}; a divisor of {dataset.num_classes} is accepted")
    groups = np.arange(dataset.num_classes).reshape(num_tasks, -1).tolist()
    return own_heads(dataset, groups, order, seed=seed)
