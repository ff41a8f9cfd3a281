"""How many threads small work gets, and a factorisation that survives torch's own thread setting.

Not by torch.set_num_threads: its setting is the process's and, once made, batched LU on several
threads gives wrong pivots, or never ends (torch 2.13 with MKL). OpenMP's own setting is the calling
thread's, and costs a microsecond.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

# A call of at most so many operations runs on one thread: it takes less time than a second one may
# take to come.
ALONE = 5e7
# A derivative takes at most so many operations for each number that it reads.
PER_NUMBER = 50
# More than one torch thread pays for one operation of more flops than this.
WORTH_SHARING = 1e9
# Of each thread `.counts`, the threads that the outermost `one_thread` found, and `.alone`, whether
# it holds now.
_own = threading.local()


@cache
def cores() -> int:
    """Of this machine."""
    return os.cpu_count() or 1


@cache
def _libraries() -> list:
    """The OpenMP libraries of this process, whose settings are each thread's own."""
    return [
        library
        for library in ThreadpoolController().lib_controllers
        if library.user_api == "openmp"
    ]


class one_thread:  # noqa: N801
    """`with one_thread(): ...`: the calling thread's torch operations run on it alone.

    Where other processes hold the cores, waiting for a second thread at every small operation costs
    a hundred times the operation.
    """

    def __enter__(self) -> None:
        self._nested = is_alone()
        if self._nested:
            return
        torch.get_num_threads()  # a thread's first use of torch sets its number; not after ours
        self._before = [library.get_num_threads() for library in _libraries()]
        self._outer = getattr(_own, "counts", None)
        _own.counts, _own.alone = self._outer or self._before, True
        for library in _libraries():
            library.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._nested:
            return
        _own.counts, _own.alone = self._outer, False
        for library, count in zip(_libraries(), self._before, strict=True):
            library.set_num_threads(count)


def is_alone() -> bool:
    """The calling thread's torch operations run on it alone already."""
    return getattr(_own, "alone", False)


def few_threads(operations: float) -> AbstractContextManager:
    """One thread for work of no more than ALONE operations: flops, or numbers read. The whole of
    the library's measure of that."""
    return nullcontext() if is_alone() or operations > ALONE else one_thread()


def few_threads_to_differentiate(tensors: Iterable[Tensor | None]) -> AbstractContextManager:
    """The same for a derivative that reads these."""
    return few_threads(PER_NUMBER * sum(tensor.numel() for tensor in tensors if tensor is not None))


class _Shared:
    """Inside `one_thread`: the threads that there were before."""

    def __enter__(self) -> None:
        self._alone, _own.alone = is_alone(), False
        for library, count in zip(_libraries(), getattr(_own, "counts", None) or (), strict=False):
            library.set_num_threads(count)

    def __exit__(self, *_: object) -> None:
        _own.alone = self._alone
        if getattr(_own, "counts", None):
            for library in _libraries():
                library.set_num_threads(1)


def threads_for(flops: float) -> AbstractContextManager:
    """Inside `one_thread`: more of them for one operation that is worth it."""
    return _Shared() if flops > WORTH_SHARING else nullcontext()


def lu_factor(K: Tensor) -> tuple[Tensor, Tensor]:
    """LU of a batch and its pivots; on one thread again where torch's came out wrong."""
    with threads_for(len(K) * K.shape[-1] ** 3 / 1.5):
        lu, pivots, _ = torch.linalg.lu_factor_ex(K)
    if K.device.type == "cpu" and pivots.numel() and int(pivots.min()) < 1:
        with one_thread():
            lu, pivots, _ = torch.linalg.lu_factor_ex(K)
    return lu, pivots
