"""Ready features: rows and labels belong together, files are verified, names are known."""

import shutil

import numpy as np
import pytest

from ssm_nn.models.downloads import DataError
from ssm_nn.models.ready_features import load_features

SHAPES = {
    "banking77": ((10_003, 384), (3_080, 384), 77),
    "dbpedia": ((10_000, 384), (4_000, 384), 14),
    "cifar10": ((5_000, 1_280), (1_000, 1_280), 10),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_class_mean_classifies_far_above_chance_so_rows_and_labels_belong_together(name, data_folder):
    data = load_features(name, data_folder)
    assert (data.train_x.shape, data.test_x.shape, data.num_classes) == SHAPES[name]
    assert (data.train_x.dtype, data.train_y.dtype) == (np.float32, np.int32)
    assert np.array_equal(np.unique(data.train_y), np.arange(data.num_classes))
    assert np.isfinite(data.train_x).all()
    means = np.stack([data.train_x[data.train_y == k].mean(axis=0) for k in range(data.num_classes)])
    distance = np.square(means).sum(axis=1) - 2 * data.test_x @ means.T
    assert (distance.argmin(axis=1) == data.test_y).mean() > 0.5  # chance is at most 0.1


def test_sentences_are_vectors_of_length_one(data_folder):
    data = load_features("banking77", data_folder)
    np.testing.assert_allclose(np.linalg.norm(data.test_x, axis=1), 1, atol=2e-3)


def test_a_damaged_file_is_refused(data_folder, tmp_path):
    for part in ("text_features", "dbpedia14_subset"):
        shutil.copytree(data_folder / part, tmp_path / part)
    file = tmp_path / "dbpedia14_subset" / "train.csv"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b"2,", b"3,", 1))
    with pytest.raises(DataError, match=r"train.csv is not the expected file"):
        load_features("dbpedia", tmp_path)


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(DataError, match="name is 'clinc'; known features are 'banking77', 'dbpedia', 'cifar10'"):
        load_features("clinc")
