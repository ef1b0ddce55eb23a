"""Items read ahead: the same ones in the same order, errors in their place, no more held than asked for, no thread left."""

import gc
import itertools
import threading
import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ssm_nn
from ssm_nn.inference import Diagonal, GaussNewton, LaplaceFilter, prefetched
from ssm_nn.models import RandomWalk
from ssm_nn.models.networks import mlp
from ssm_nn.tasks import stack_tasks

SOON = 10.0  # seconds, after which a thread that was to do something has failed


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if readers():
        gc.collect()
    end = time.monotonic() + SOON
    while readers() and time.monotonic() < end:
        time.sleep(0.01)
    assert not readers()


@pytest.mark.parametrize("depth", [1, 3, 100])
@pytest.mark.parametrize("number", [0, 1, 20])
def test_items_come_in_their_order(depth, number):
    assert list(prefetched(range(number), depth)) == list(range(number))


def test_none_is_an_item():
    assert list(prefetched([None, 1, None])) == [None, 1, None]


def test_the_next_item_is_read_while_one_is_in_use():
    second = threading.Event()

    def items():
        yield 0
        second.set()
        yield 1

    ahead = prefetched(items())
    assert next(ahead) == 0
    assert second.wait(SOON)
    assert list(ahead) == [1]


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_wait(depth):
    begun = threading.Semaphore(0)

    def items():
        for number in itertools.count():
            begun.release()
            yield number

    ahead = prefetched(items(), depth)
    for used in range(4):
        assert next(ahead) == used
        for _ in range(depth + 1 if used == 0 else 1):
            assert begun.acquire(timeout=SOON)
        assert not begun.acquire(timeout=0.05)


def test_nothing_is_read_before_the_first_item_is_asked_for():
    ahead = prefetched(iter(lambda: pytest.fail("read"), None))
    assert not readers()
    del ahead


@pytest.mark.parametrize("error", [OSError("no such file"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_is_raised_where_its_item_would_have_come(error):
    def items():
        yield from range(2)
        raise error

    ahead, found = prefetched(items(), 5), []
    with pytest.raises(type(error)) as caught:
        found.extend(iter(lambda: next(ahead), None))
    assert caught.value is error
    with pytest.raises(StopIteration):
        next(ahead)
    ahead = prefetched(items(), 5)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(type(error)):
        next(ahead)


def test_what_cannot_be_begun_is_an_error_of_the_first_item():
    class Broken:
        def __iter__(self):
            raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection"):
        next(prefetched(Broken()))


@pytest.mark.parametrize("how", ["closed", "forgotten", "left by an error"])
def test_an_iterator_that_is_abandoned_ends_its_thread_and_its_generator(how):
    ended = threading.Event()

    def items():
        try:
            yield from itertools.count()
        finally:
            ended.set()

    ahead = prefetched(items(), 2)
    assert next(ahead) == 0
    if how == "closed":
        ahead.close()
    elif how == "forgotten":
        del ahead
        gc.collect()
    else:
        with pytest.raises(ZeroDivisionError):
            [1 // (number - 1) for number in ahead]
        del ahead
        gc.collect()
    assert ended.wait(SOON)


@pytest.mark.parametrize("depth", [0, -1, 1.5, True])
def test_a_depth_that_is_no_count_is_refused(depth):
    with pytest.raises(ValueError, match="depth is"):
        prefetched([1], depth)


@pytest.mark.parametrize("items", [{"x": np.ones(2)}, stack_tasks([{"x": np.ones((2, 1))}]), 3, None])
def test_what_is_no_iterable_of_items_is_refused(items):
    with pytest.raises(ValueError, match="an iterable of tasks or batches is accepted"):
        prefetched(items)


def program(tasks):
    net = ssm_nn.weights(
        "net", mlp((2, 1)), prior=dist.Normal(0.0, 1.0), transition=RandomWalk(0.1), num_tasks=len(tasks)
    )

    def observe(f, task):
        with numpyro.plate("examples", task["x"].shape[0]):
            numpyro.sample("y", dist.Normal(f(task["x"])[:, 0], 0.5), obs=task.get("y"))

    net.over(tasks, observe)


def drawn(number):
    for t in range(number):
        rng = np.random.default_rng(t)
        yield {"x": rng.normal(size=(3, 2)).astype(np.float32), "y": rng.normal(size=3).astype(np.float32)}


def test_a_filter_learns_the_same_from_tasks_read_ahead():
    engine = LaplaceFilter(program, Diagonal(), estimator=GaussNewton())
    plain, ahead = engine.run(0, drawn(3)), engine.run(0, prefetched(drawn(3)))
    jax.tree.map(np.testing.assert_array_equal, tuple(plain.beliefs), tuple(ahead.beliefs))


def test_a_filter_that_fails_leaves_no_reader_behind():
    engine = LaplaceFilter(program, Diagonal(), estimator=GaussNewton())
    tasks = itertools.chain(drawn(2), [{"x": np.ones((3, 5), np.float32), "y": np.ones(3, np.float32)}], drawn(9))
    with pytest.raises(ValueError, match="task 2"):
        engine.run(0, prefetched(tasks))
