"""Camelyon17-WILDS: patches of lymph-node sections from five hospitals, one task a hospital, read from files on disk."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssm_nn.models.downloads import DataError
from ssm_nn.models.stream_making import EXAMPLES, check_seed, check_size, generator, natural_order
from ssm_nn.models.task_streams import LazyTasks, TaskStream
from ssm_nn.tasks import Task

__all__ = ["camelyon17"]

SIDE = 96
COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center")


def camelyon17(
    folder: str | Path,
    train_size: int | None = 1000,
    test_size: int | None = 1000,
    seed: int = 0,
    order: Sequence[int] | None = None,
) -> TaskStream:
    """Task k holds patches of hospital k; the label says whether the middle 32 x 32 pixels hold tumour tissue.

    Only the table is read at once; the images of a task are read when the task is asked for. Within a hospital the
    patches are drawn without replacement, those for testing first, so that no patch is on both sides; slides are. The
    official splits, which keep whole hospitals for validation and test, are not used: here every hospital is learnt.

    Args:
        folder: the unpacked ``camelyon17_v1.0`` with ``metadata.csv`` and ``patches/patient_<p>_node_<n>/``. There is no
            download (10 GB): https://wilds.stanford.edu/get_started.
        train_size, test_size: patches of each hospital; None takes all that are left for training, and half of the
            patches for testing. A thousand take 110 MB.
        seed: non-negative; draws the patches.
        order: a permutation of 0 ... T - 1, the hospitals of the table in the order in which they come.

    Returns:
        A stream of T hospitals (five) with "x" float32 (N, 96, 96, 3) in [0, 1] and "y" int32 (N,), and the context
        {"hospital": int32, the table's ``center``}.

    Raises:
        DataError: a missing folder, table or column; when a task is asked for, a missing patch or one of another size.
        ValueError: an argument out of range.

    Source: Bandi et al. 2018 (CC0), Koh et al. 2021 (WILDS).
    """
    root = Path(folder).expanduser()
    check_seed(seed)
    centers, labels, paths = _table(root / "metadata.csv")
    hospitals = np.unique(centers)
    natural = natural_order(order, len(hospitals))
    own = [np.flatnonzero(centers == hospital) for hospital in hospitals]
    smallest = min(map(len, own))
    check_size(test_size, smallest - 1, "test_size", "of the smallest hospital, one left for training")
    num_test = [len(rows) // 2 if test_size is None else test_size for rows in own]
    left = min(len(rows) - n for rows, n in zip(own, num_test, strict=True))
    check_size(train_size, left, "train_size", "left in the smallest hospital")
    drawn = [generator(seed, EXAMPLES, k).permutation(rows) for k, rows in enumerate(own)]

    def task(rows: np.ndarray, k: int) -> Task:
        x = np.stack([_patch(root / paths[row]) for row in rows])
        return Task({"x": x, "y": labels[rows]}, {"hospital": np.int32(hospitals[k])})

    def train(t: int) -> Task:
        k = natural[t]
        return task(drawn[k][num_test[k] :][:train_size], k)

    def test(t: int) -> Task:
        k = natural[t]
        return task(drawn[k][: num_test[k]], k)

    return TaskStream(
        name="hospitals camelyon17",
        train=LazyTasks(train, len(natural)),
        test=LazyTasks(test, len(natural), keep=True),
        num_classes=2,
        input_shape=(SIDE, SIDE, 3),
        settings={
            "dataset": "camelyon17",
            "shift": "hospitals",
            "num_tasks": len(natural),
            "train_size": train_size,
            "test_size": test_size,
            "seed": seed,
            "order": list(natural),
            "flatten": False,
        },
    )


def _table(place: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Hospital (N,) and label int32 (N,) of each patch, and where it lies."""
    if not place.is_file():
        raise DataError(f"{place} is missing; folder must be the unpacked camelyon17_v1.0 of WILDS")
    with place.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        lacking = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if lacking:
            raise DataError(f"{place} has no column {', '.join(lacking)}; {', '.join(COLUMNS)} are needed")
        centers, labels, paths = [], [], []
        for row in rows:
            where = f"patient_{row['patient']}_node_{row['node']}"  # the patient as written: 004
            centers.append(int(row["center"]))
            labels.append(int(row["tumor"]))
            paths.append(f"patches/{where}/patch_{where}_x_{row['x_coord']}_y_{row['y_coord']}.png")
    if not paths:
        raise DataError(f"{place} holds no patch")
    return np.array(centers), np.array(labels, np.int32), paths


def _patch(place: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError  # only needed where something is decoded

    try:
        with Image.open(place) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32)
    except FileNotFoundError as error:
        raise DataError(f"{place} is missing, though metadata.csv names it") from error
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{place} cannot be read as an image ({error})") from error
    if pixels.shape != (SIDE, SIDE, 3):
        raise DataError(f"{place} has the shape {pixels.shape}; patches are ({SIDE}, {SIDE}, 3)")
    return pixels / np.float32(255)
