"""A LinearMap is its matrix, whichever way it is applied."""

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from far import Far, far_device, send

from convlayer.conic.linear_map import LinearMap

MATRICES = {
    "the identity": sp.eye_array(5, format="csr"),
    "a run of entries": sp.csr_array(np.eye(6)[2:5]),
    "a permutation": sp.csr_array(np.eye(5)[[3, 0, 4, 1, 2]]),
    "scaled entries, some twice": sp.csr_array(np.diag([2.0, -1.0, 0.5, 1.0])[[0, 0, 3, 2, 1]]),
    "rows without entries": sp.csr_array(np.eye(4) * [[1], [0], [1], [0]]),
    "sums": sp.random_array((7, 5), density=0.4, rng=np.random.default_rng(0), format="csr"),
    "nothing": sp.csr_array((3, 4)),
    "no outputs": sp.csr_array((0, 4)),
}


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("name", MATRICES)
def test_it_multiplies_every_row_of_a_batch(name, batch):
    matrix = MATRICES[name]
    x = torch.randn(
        batch, matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    mapping = LinearMap(matrix)
    expected = x @ torch.from_numpy(matrix.toarray()).T
    torch.testing.assert_close(mapping(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(mapping))(x), expected)
    with far_device():
        there = mapping(send(x))
        assert isinstance(there, Far)
    torch.testing.assert_close(there.inner, expected)


def test_an_output_without_inputs_may_read_a_blank():
    mapping = LinearMap(
        sp.csr_array(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])), blank=0
    )
    x = torch.tensor([[0.0, 2.0, 3.0]], dtype=torch.float64)
    assert mapping(x).tolist() == [[2.0, 0.0, 3.0]]
