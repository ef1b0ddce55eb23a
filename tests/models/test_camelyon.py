"""The hospitals of Camelyon17-WILDS, on a few patches of the same layout."""

import numpy as np
import pytest
from PIL import Image

from ssm_nn.models.camelyon import camelyon17
from ssm_nn.models.downloads import DataError
from ssm_nn.tasks import stack_tasks

HEADER = ",patient,node,x_coord,y_coord,tumor,slide,center,split"
COUNTS = {0: 6, 1: 8, 3: 7}  # patches a hospital


@pytest.fixture
def folder(tmp_path):
    """Patches that carry their row in the red channel, their hospital in green, their label in blue."""
    lines, row = [HEADER], 0
    for center, count in COUNTS.items():
        for n in range(count):
            label, place = n % 2, f"patient_{center:03}_node_{n % 3}"
            lines.append(f"{row},{center:03},{n % 3},{32 * n},{64 * n},{label},{center},{center},0")
            path = tmp_path / "patches" / place / f"patch_{place}_x_{32 * n}_y_{64 * n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((96, 96, 4), [row, center, 255 * label, 255], np.uint8)
            pixels[0, 0] = 0, 0, 0, 255
            Image.fromarray(pixels, "RGBA").save(path)
            row += 1
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def rows(task) -> set[int]:
    return set(np.rint(task["x"][:, 5, 5, 0] * 255).astype(int))


def test_each_task_holds_patches_of_its_own_hospital_under_their_labels(folder):
    stream = camelyon17(folder, train_size=4, test_size=2)
    assert (len(stream), stream.input_shape, stream.num_classes) == (3, (96, 96, 3), 2)
    for hospital, train, test in zip(COUNTS, stream.train, stream.test, strict=True):
        for task, size in ((train, 4), (test, 2)):
            assert task["x"].shape == (size, 96, 96, 3)
            assert (task["x"].dtype, task["y"].dtype) == (np.float32, np.int32)
            assert task.context == {"hospital": hospital}
            np.testing.assert_array_equal(np.rint(task["x"][:, 5, 5, 1] * 255), hospital)
            np.testing.assert_array_equal(task["x"][:, 5, 5, 2], task["y"])
            assert not task["x"][:, 0, 0].any()
    assert stack_tasks(stream.train)["x"].shape == (3, 4, 96, 96, 3)


def test_no_patch_is_on_both_sides_and_all_may_be_taken(folder):
    stream = camelyon17(folder, train_size=None, test_size=None)
    for count, train, test in zip(COUNTS.values(), stream.train, stream.test, strict=True):
        assert not rows(train) & rows(test)
        assert len(rows(train) | rows(test)) == count
    assert rows(camelyon17(folder, train_size=4, test_size=2).train[0]).isdisjoint(
        rows(camelyon17(folder, train_size=4, test_size=2).test[0])
    )


def test_the_seed_draws_and_the_order_moves_hospitals(folder):
    first, again, moved = (
        camelyon17(folder, train_size=4, test_size=2, seed=1, order=order) for order in (None, None, [2, 0, 1])
    )
    assert [rows(task) for task in first.train] == [rows(task) for task in again.train]
    assert [int(task.context["hospital"]) for task in moved.train] == [3, 0, 1]
    assert rows(moved.train[0]) == rows(first.train[2])
    others = [rows(camelyon17(folder, train_size=4, test_size=2, seed=seed).train[1]) for seed in range(2, 6)]
    assert any(other != rows(first.train[1]) for other in others)


def test_images_are_read_only_when_a_task_is_asked_for(folder):
    for path in (folder / "patches").rglob("patch_patient_003*"):
        path.unlink()
    stream = camelyon17(folder, train_size=2, test_size=2)
    assert stream.train[0].num_examples == 2
    with pytest.raises(DataError, match=r"patient_003.*png is missing, though metadata.csv names it"):
        stream.train[2]


def test_damaged_patches_are_named(folder):
    for path in (folder / "patches").rglob("patch_patient_000*"):
        path.write_bytes(b"no image")
    for path in (folder / "patches").rglob("patch_patient_001*"):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    stream = camelyon17(folder, train_size=2, test_size=2)
    with pytest.raises(DataError, match=r"patient_000.*cannot be read as an image"):
        stream.train[0]
    with pytest.raises(DataError, match=r"has the shape \(32, 32, 3\); patches are \(96, 96, 3\)"):
        stream.train[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_size": 5, "test_size": 2}, "train_size is 5; accepted are 1 to 4"),
        ({"test_size": 6}, "test_size is 6; accepted are 1 to 5"),
        ({"train_size": 2, "test_size": 2, "seed": -1}, "seed is -1"),
        ({"train_size": 2, "test_size": 2, "order": [0, 1]}, "a permutation of 0 ... 2"),
    ],
)
def test_arguments_out_of_range_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        camelyon17(folder, **arguments)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"metadata.csv is missing; folder must be the unpacked camelyon17_v1.0"):
        camelyon17(tmp_path)
    (tmp_path / "metadata.csv").write_text("patient,node\n1,2\n")
    with pytest.raises(DataError, match="has no column x_coord, y_coord, tumor, center"):
        camelyon17(tmp_path)
    (tmp_path / "metadata.csv").write_text(HEADER + "\n")
    with pytest.raises(DataError, match="holds no patch"):
        camelyon17(tmp_path)
