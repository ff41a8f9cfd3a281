"""What is worked out once: for each object and device, in threads, and not longer than the object
lives."""

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from convlayer.memo import constants, once_for_each


class Counted:
    """Counts how often its value was worked out."""

    def __init__(self) -> None:
        self.calls: list = []

    @once_for_each
    def on(self, device: torch.device) -> torch.Tensor:
        self.calls.append(device)
        time.sleep(0.01)
        return torch.ones(2, device=device)


@once_for_each
def partner(owner: Counted) -> list:
    return [owner]


CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_value_is_worked_out_once_for_each_object_and_device():
    first, second = Counted(), Counted()
    assert first.on(CPU) is first.on(CPU)
    assert first.on(META).device == META
    assert second.on(CPU) is not first.on(CPU)
    assert first.calls == [CPU, META]
    assert second.calls == [CPU]


def test_threads_that_ask_at_once_get_the_same_value_of_one_call():
    owner, together = Counted(), threading.Barrier(8)

    def ask(_: int) -> torch.Tensor:
        together.wait()
        return owner.on(CPU)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(owner.calls) == 1
    assert all(value is found[0] for value in found)


def test_a_call_that_fails_is_made_again():
    wanted = iter([ValueError("not yet"), 3])

    class Owner:
        @once_for_each
        def value(self) -> int:
            outcome = next(wanted)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    owner = Owner()
    with pytest.raises(ValueError, match="not yet"):
        owner.value()
    assert owner.value() == owner.value() == 3


@pytest.mark.parametrize("again", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
def test_a_copy_works_its_values_out_again(again):
    owner = Counted()
    owner.on(META)
    twin = again(owner)
    assert torch.equal(twin.on(CPU), owner.on(CPU))
    assert len(owner.calls) == len(twin.calls) == 2
    twin.on(META)
    assert len(twin.calls) == 3


def test_values_go_with_their_object_even_where_they_hold_it():
    owner = Counted()
    partner(owner)
    seen = weakref.ref(owner)
    del owner
    gc.collect()
    assert seen() is None


def test_what_is_made_under_inference_mode_serves_a_gradient():
    @constants
    def weights(size: int) -> torch.Tensor:
        return torch.ones(size)

    owner = Counted()
    with torch.inference_mode():
        weights(2), owner.on(CPU)
    x = torch.ones(2, requires_grad=True)
    (x * weights(2) * owner.on(CPU)).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))
