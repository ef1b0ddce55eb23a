"""Ready features of a frozen network, with labels: what a last layer learns from, without the network.

``banking77`` and ``dbpedia`` are sentence embeddings, ``cifar10`` pooled features of images. Found in a folder, in SSM_NN_DATA
or in the cache, as every data set is; no download of the features is known.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ssm_nn.models.downloads import DataError, DataFile, read_file

__all__ = ["ReadyFeatures", "load_features"]

NUM_DBPEDIA_TRAIN = 10_000  # of 14,000 in the file's shuffled order; the other 4,000 are the test set
DBPEDIA_CLASSES = 14


@dataclass(frozen=True, eq=False)
class ReadyFeatures:
    """Features float32 with labels 0 ... num_classes - 1; ``source`` says where they come from and under which licence."""

    name: str
    train_x: Float[np.ndarray, "train features"]
    train_y: Int[np.ndarray, " train"]
    test_x: Float[np.ndarray, "test features"]
    test_y: Int[np.ndarray, " test"]
    num_classes: int
    source: str


_BANKING = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data"
BANKING_FEATURES = DataFile(
    "text_features/banking77_minilm.npz", "77cd9ae7930d1be99677a7608ab2a20ec4de71382b74dffa76afa2f387e7e831", 10048248
)
BANKING_TRAIN = DataFile(
    "banking77/train.csv",
    "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    839073,
    (f"{_BANKING}/train.csv",),
)
BANKING_TEST = DataFile(
    "banking77/test.csv",
    "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
    239961,
    (f"{_BANKING}/test.csv",),
)
BANKING_NAMES = DataFile(
    "banking77/categories.json", "53261da888122daf2d120d925458631d9619e15d82e56052e7a42e535ce32b63", 2036
)
DBPEDIA_FEATURES = DataFile(
    "text_features/dbpedia14_subset_minilm.npz",
    "37c17c2d49e28267db514925336afeac45eed88a15dfeeb527278e831f9636e3",
    10752264,
)
DBPEDIA_TRAIN = DataFile(
    "dbpedia14_subset/train.csv", "57b652af792e41d5f84638892fec592ed55021c586f1fe7b087b6d8e208d8599", 4029294
)
CIFAR_FEATURES = DataFile(
    "image_features/cifar10_jpeg_subset_efficientnet_lite0_96px.npz",
    "c94b00751872c8dc28ddb994c366b0b1335abbbd635ba505521af47ff6614657",
    9216672,
)
_MINILM = "all-MiniLM-L6-v2 sentence embeddings (Apache-2.0)"


def load_features(name: str, folder: str | Path | None = None) -> ReadyFeatures:
    """Features of a frozen network, with labels.

    Args:
        name: ``"banking77"`` (384 features, 10,003 + 3,080 sentences, 77 classes), ``"dbpedia"`` (384 features, 10,000 +
            4,000 of a subset of 14 x 1,000 texts, 14 classes) or ``"cifar10"`` (1,280 features, 5,000 + 1,000 of the JPEG
            copies of CIFAR-10, 10 classes).
        folder: the only data folder to look in; None looks in SSM_NN_DATA and in the cache.

    Returns:
        ReadyFeatures, float32 and int32; the files hold float16.

    Raises:
        DataError: an unknown name; a missing or damaged file.
    """
    if name not in _LOADERS:
        raise DataError(f"name is {name!r}; known features are {', '.join(map(repr, _LOADERS))}")
    return _LOADERS[name](folder)


def _banking(folder: str | Path | None) -> ReadyFeatures:
    number = {word: n for n, word in enumerate(json.loads(read_file(BANKING_NAMES, folder)))}

    def labels(file: DataFile) -> np.ndarray:
        rows = csv.DictReader(io.StringIO(read_file(file, folder).decode("utf-8"), newline=""))
        return np.array([number[row["category"]] for row in rows], np.int32)

    features = _arrays(BANKING_FEATURES, folder)
    return _made(
        "banking77",
        (features["train"], labels(BANKING_TRAIN), features["test"], labels(BANKING_TEST)),
        len(number),
        f"Banking77 (Casanueva et al. 2020), CC BY 4.0; {_MINILM}",
    )


def _dbpedia(folder: str | Path | None) -> ReadyFeatures:
    lines = read_file(DBPEDIA_TRAIN, folder).decode("utf-8").splitlines()
    labels = np.array([line.split(",", 1)[0] for line in lines if line], np.int32)
    labels -= labels.min()
    features = _arrays(DBPEDIA_FEATURES, folder)["train"]
    cut = NUM_DBPEDIA_TRAIN
    return _made(
        "dbpedia",
        (features[:cut], labels[:cut], features[cut:], labels[cut:]),
        DBPEDIA_CLASSES,
        f"DBpedia ontology, subset of 14 x 1,000 (Zhang, Zhao, LeCun 2015), CC BY-SA 3.0 and GFDL; {_MINILM}",
    )


def _cifar(folder: str | Path | None) -> ReadyFeatures:
    arrays = _arrays(CIFAR_FEATURES, folder)
    return _made(
        "cifar10",
        (arrays["train_features"], arrays["train_labels"], arrays["test_features"], arrays["test_labels"]),
        10,
        "CIFAR-10 after JPEG compression, 5,000 + 1,000 images (Krizhevsky 2009), no licence stated; EfficientNet-Lite0 "
        "features (Apache-2.0)",
    )


def _arrays(file: DataFile, folder: str | Path | None) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(read_file(file, folder)), allow_pickle=False) as content:
        return dict(content)


def _made(name: str, arrays: tuple[np.ndarray, ...], num_classes: int, source: str) -> ReadyFeatures:
    train_x, train_y, test_x, test_y = arrays
    for features, labels in ((train_x, train_y), (test_x, test_y)):
        if len(features) != len(labels):
            raise DataError(f"{name} has {len(features)} rows of features and {len(labels)} labels; as many are needed")
    x, held_out = (features.astype(np.float32) for features in (train_x, test_x))
    return ReadyFeatures(name, x, train_y.astype(np.int32), held_out, test_y.astype(np.int32), num_classes, source)


_LOADERS = {"banking77": _banking, "dbpedia": _dbpedia, "cifar10": _cifar}
