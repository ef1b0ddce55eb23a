"""The papers' networks: counted parameters, no example sees another, every kernel found by the factored path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_nn.inference.perturbation.factored import find_blocks
from ssm_nn.models.image_networks import alexnet, lenet, resnet18
from ssm_nn.networks import as_network


def count(make, **arguments):
    shapes = jax.eval_shape(lambda: make(**arguments)[1])  # millions of weights need not be drawn
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_lenet_has_the_papers_number_of_parameters():
    assert count(lenet) == 2_995_620
    assert count(lenet, num_outputs=5) == 2_995_620 - 5 * 501


def test_numbers_of_parameters_of_the_larger_networks():
    convolutions = 4 * 4 * 3 * 64 + 3 * 3 * 64 * 128 + 2 * 2 * 128 * 256
    assert count(alexnet) == convolutions + 1024 * 2048 + 2048 * 2048 + 3 * (448 + 4096) + 2049 * 10
    # the usual ResNet-18 for small images, the scales and biases of batch normalisation counted
    assert count(resnet18) == 11_173_962


SMALL = {
    "lenet": lenet((12, 12), 3, (2, 4), (6, 5)),
    "alexnet": alexnet((24, 24, 2), 3, (2, 3, 4), (6, 5)),
    "resnet18": resnet18((8, 8), 3, (4, 8, 8, 8), groups=2),
}
KERNELS = {"lenet": 4, "alexnet": 5, "resnet18": 20}  # without the head


@pytest.mark.parametrize("name", SMALL)
def test_outputs_of_an_example_do_not_depend_on_the_others(name, rng):
    apply, params = SMALL[name]
    x = jnp.asarray(rng.normal(size=(3, *{"lenet": (12, 12), "alexnet": (24, 24, 2), "resnet18": (8, 8)}[name])))
    together = apply(params, x)
    assert together.shape == (3, 3)
    np.testing.assert_allclose(together[1], apply(params, x[1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="x has shape"):
        apply(params, jnp.ones((3, 5, 5)))


@pytest.mark.parametrize("name", SMALL)
def test_every_kernel_but_the_head_is_a_layer_of_the_factored_path(name):
    network = as_network(SMALL[name])
    shape = {"lenet": (1, 12, 12), "alexnet": (1, 24, 24, 2), "resnet18": (1, 8, 8)}[name]
    shared = {("net", p) for p, leaf in network.initial.items() if jnp.ndim(leaf) >= 2 and not p.startswith("head")}
    blocks = find_blocks(lambda a: network.bind(a["net"])(jnp.ones(shape)), {"net": network.initial}, shared, None)
    assert len(blocks) == KERNELS[name]
    assert {block.name for block in blocks} == shared


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lenet((12,)), "input_shape"),
        (lambda: lenet(num_outputs=0), "num_outputs"),
        (lambda: alexnet((4, 4, 3)), "nothing is left"),
        (lambda: alexnet(channels=(2, 3)), "channels"),
        (lambda: resnet18(channels=(12, 8)), "groups is 8"),
    ],
)
def test_bad_sizes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
