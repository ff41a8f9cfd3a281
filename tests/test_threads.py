"""Small work runs on one thread, in the calling thread only; batched LU is right on any number of threads."""

import subprocess
import sys
import threading

import torch

from convlayer import problems
from convlayer.threads import lu_factor, one_thread


def test_one_thread_holds_inside_and_in_the_calling_thread_only():
    before, seen = torch.get_num_threads(), []
    with one_thread():
        assert torch.get_num_threads() == 1
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert torch.get_num_threads() == before
    assert seen == [before]


def test_lu_with_wrong_pivots_is_done_again(monkeypatch):
    original, calls = torch.linalg.lu_factor_ex, []

    def wrong_at_first(K):
        lu, pivots, info = original(K)
        calls.append(torch.get_num_threads())
        return (lu, pivots * 0, info) if len(calls) == 1 else (lu, pivots, info)

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", wrong_at_first)
    K = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lu, pivots = lu_factor(K)
    P, L, U = torch.lu_unpack(lu, pivots)
    assert len(calls) == 2
    assert calls[1] == 1
    assert torch.allclose(P @ L @ U, K)


def test_a_process_of_several_threads_solves_growing_systems():
    """Where the thread setting is made anew between calls, batched LU of such sizes has come out wrong."""
    code = """
import torch
from convlayer import problems
for n in (16, 20, 24):
    (X,) = problems.leading_eigenvector.sample(16, 0, n)
    layer = problems.leading_eigenvector.layer(n, structure="generic")
    for _ in range(2):
        layer(X.requires_grad_())[0].sum().backward()
print("right", torch.get_num_threads())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.startswith("right"), run.stderr[-2000:]


def test_a_layer_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    for structure in ("auto", "generic"):
        layer = problems.ridge.layer(6, 3, structure=structure)
        inputs = [t.requires_grad_() for t in problems.ridge.sample(4, 0, 6, 3)]
        layer(*inputs)[0].sum().backward()
        assert torch.get_num_threads() == before
