"""Task-incremental sequences: labels of the task's own, the papers' orders, and small files of the originals' formats."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from ssm_nn.models import omniglot as omniglot_module
from ssm_nn.models import tiny_imagenet
from ssm_nn.models.cifar100 import SPLIT_ORDERS, SUPERCLASS_ORDERS, own_heads, superclasses
from ssm_nn.models.datasets import Dataset, load
from ssm_nn.models.downloads import DataError
from ssm_nn.models.omniglot import Drawings, omniglot, omniglot_rotation


def drawings(rng, counts):
    """Each image's first pixel says which drawing it is, the second which character."""
    character = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    images = rng.integers(1, 200, (len(character), 28, 28)).astype(np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(len(character)), character
    return Drawings(images, character, "made here")


def test_orders_of_the_paper_are_permutations():
    for orders, count in ((SPLIT_ORDERS, 10), (SUPERCLASS_ORDERS, 20)):
        assert list(orders) == list("ABCDE")
        for order in orders.values():
            assert sorted(order) == list(range(count))


def test_own_heads_relabel_and_keep_a_task_whatever_the_order():
    digits, groups = load("digits"), [[3, 1], [0, 7], [9, 2]]
    natural = own_heads(digits, groups, train_size=60)
    turned = own_heads(digits, groups, [2, 0, 1], train_size=60)
    assert natural.num_classes == 2
    for t, k in enumerate([2, 0, 1]):
        task, same = turned.train[t], natural.train[k]
        assert int(task.context["task"]) == k
        assert np.array_equal(task["x"], same["x"])
        assert set(task["y"].tolist()) == {0, 1}
    x, y = natural.train[0]["x"], natural.train[0]["y"]
    for image, label in zip(x[:20], y[:20], strict=True):
        (row,) = np.flatnonzero((digits.train_x == image).all((1, 2)))[:1]
        assert digits.train_y[row] == groups[0][label]


@pytest.mark.parametrize("groups", [[[1, 2], [3]], [[1, 2], [2, 3]], [[1, 12], [0, 3]], [[]]])
def test_groups_that_make_no_tasks_are_refused(groups):
    with pytest.raises(ValueError, match="groups is"):
        own_heads(load("digits"), groups)


def test_superclasses_are_read_off_the_two_labels():
    assert superclasses(np.array([4, 1, 3, 0, 4, 2]), np.array([0, 1, 0, 1, 0, 1])) == [[3, 4], [0, 1, 2]]
    with pytest.raises(ValueError, match="no grouping"):
        superclasses(np.array([1, 1]), np.array([0, 1]))


def test_omniglot_tasks_hold_their_characters_in_four_rotations(rng):
    made = drawings(rng, [5, 4, 5, 3, 5, 5, 5])
    stream = omniglot_rotation(made, characters=3, order=[1, 0])
    assert len(stream) == 2
    for t, k in enumerate([1, 0]):
        train, test = stream.train[t], stream.test[t]
        assert int(train.context["task"]) == k
        assert train["x"].shape == (3 * 4 * 4, 28, 28)
        assert test["x"].shape == (3 * 1 * 4, 28, 28)
        seen = []
        for task in (train, test):
            x = (task["x"] * 255).round().astype(int).reshape(4, -1, 28, 28)
            for quarter in range(4):
                upright = np.rot90(x[quarter], -quarter, (1, 2))
                assert np.array_equal(upright, x[0])
            labels, mask = task["y"].reshape(4, -1)[0], task.mask.reshape(4, -1)[0]
            assert np.array_equal(x[0][:, 0, 1], labels + 3 * k)
            seen.append(x[0][:, 0, 0][mask].tolist())
        together = sorted(seen[0] + seen[1])
        assert together == np.flatnonzero((made.character >= 3 * k) & (made.character < 3 * k + 3)).tolist()


def test_omniglot_of_the_real_file(data_folder):
    found = omniglot(folder=data_folder)
    assert found.images.shape == (16833, 28, 28)
    assert found.character.max() == 963
    stream = omniglot_rotation(found)
    assert len(stream) == 80
    assert stream.train[79]["x"].shape == stream.train[0]["x"].shape == (12 * 16 * 4, 28, 28)
    assert stream.num_classes == 12


def test_omniglot_archive_is_averaged_down(rng):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for character in (2, 1):
            page = np.full((105, 105), 255, np.uint8)
            page[:, : 15 * character] = 0
            image = io.BytesIO()
            Image.fromarray(page).convert("1").save(image, "PNG")
            archive.writestr(f"images_background/Greek/character0{character}/0001_01.png", image.getvalue())
    images, character = omniglot_module.read_archive(buffer.getvalue())
    assert character.tolist() == [0, 1]
    assert images.shape == (2, 28, 28)
    assert np.all(images[0, :, :4] == 255)
    assert np.all(images[0, :, 4:] == 0)
    with pytest.raises(DataError, match="no zip file"):
        omniglot_module.read_archive(b"nothing")


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"characters": 1}, "characters is 1"), ({"num_tasks": 9}, "num_tasks is 9"), ({"seed": -1}, "seed is -1")],
)
def test_bad_arguments_of_omniglot_are_named(rng, changed, words):
    with pytest.raises(ValueError, match=words):
        omniglot_rotation(drawings(rng, [3] * 6), **{"characters": 3, **changed})


def tiny_archive(annotations="val_0.JPEG\tn02\t0\t0\t9\t9\n", size=64):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:

        def put(name, grey):
            image = io.BytesIO()
            Image.fromarray(np.full((size, size), grey, np.uint8)).save(image, "JPEG")
            archive.writestr(f"tiny-imagenet-200/{name}", image.getvalue())

        for number, label in enumerate(("n02", "n01", "n02")):
            put(f"train/{label}/images/{label}_{number}.JPEG", 40 * number)
        put("val/images/val_0.JPEG", 200)
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", annotations)
    return buffer.getvalue()


def test_tiny_imagenet_is_read_from_its_archive():
    found = tiny_imagenet.read_archive(tiny_archive())
    assert isinstance(found, Dataset)
    assert found.train_y.tolist() == [0, 1, 1]
    assert found.test_y.tolist() == [1]
    assert found.train_x.shape == (3, 64, 64, 3)
    np.testing.assert_allclose(found.train_x[:, 0, 0, 0] * 255, [40, 0, 80], atol=2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"nothing", "no zip file"),
        (lambda: tiny_archive(annotations=""), "says nothing"),
        (lambda: tiny_archive(annotations="val_0.JPEG\tn07\n"), "n07"),
        (lambda: tiny_archive(size=32), "shape"),
    ],
)
def test_a_damaged_tiny_imagenet_is_refused(content, words):
    with pytest.raises(DataError, match=words):
        tiny_imagenet.read_archive(content())
