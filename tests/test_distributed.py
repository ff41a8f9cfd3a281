"""Several processes: a batch split between them has one process's gradient, and rows that other
processes solve have the same answers."""

import multiprocessing
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import fields
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import CASES, leaves, outputs_of, relative, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from convlayer import problems
from convlayer.conic.program import Program
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.dealing import Inline, workers_of

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed_training.py"
ROWS, TASKS = 64, 4  # so many rows are dealt to two workers in so many tasks
# the task, counted from 0 in the order of their beginnings, at which a Mortal dies: some are done,
# some not begun
FATAL = 2

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this build of torch has no gloo, which joins processes on CPUs",
)


def on_two_processes(script: Path) -> str:
    """What a script prints under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


class Chain(nn.Module):
    """A layer on a kernel of its own and one on the cone program, each behind weights to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.sparsemax = nn.Linear(6, 5), problems.sparsemax.layer(5)
        self.middle, self.ball = (
            nn.Linear(5, 4),
            problems.ball_projection.layer(4, structure="generic"),
        )
        assert self.sparsemax.structure == "sparsemax"
        assert self.ball.structure == "cone_program"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        (attention,) = self.sparsemax(self.enter(inputs))
        (projected,) = self.ball(3 * self.middle(attention), inputs.new_tensor(0.9))
        return projected


def compare_gradients() -> None:
    """What each of the two processes runs; prints how far the gradients of both together, and of
    its own rows, are from the batch's."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, inputs, targets = Chain(), 2 * torch.randn(10, 6), torch.randn(10, 4)
    dist.init_process_group("gloo")
    mine = slice(dist.get_rank(), None, dist.get_world_size())

    def loss(network: nn.Module, rows: slice) -> torch.Tensor:
        return (network(inputs[rows]) - targets[rows]).square().sum(-1).mean()

    def gradient(rows: slice) -> torch.Tensor:
        return parameters_to_vector(
            torch.autograd.grad(loss(model, rows), list(model.parameters()))
        )

    model_of_all = DistributedDataParallel(model)
    loss(model_of_all, mine).backward()
    together = parameters_to_vector(p.grad for p in model.parameters())
    whole, own = gradient(slice(None)), gradient(mine)
    # One write: the two processes share the stream.
    print(f"together {relative(together, whole)} own {relative(own, whole)}\n", end="", flush=True)
    dist.destroy_process_group()


@pytest.mark.long
@needs_gloo
def test_two_processes_have_the_gradient_of_one():
    said = re.findall(r"together (\S+) own (\S+)", on_two_processes(Path(__file__)))
    assert len(said) == 2
    for together, own in said:
        assert float(together) < 1e-12
        assert float(own) > 1e-2  # so that it took both


@pytest.mark.long
@needs_gloo
def test_the_example_learns_on_two_processes_what_it_learns_on_one(capsys):
    def losses(said: str) -> list[float]:
        return [float(loss) for loss in re.findall(r"epoch \d+: loss (\S+)", said)]

    dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        torch.set_default_dtype(dtype)
    assert ended.value.code == 0
    alone, said = losses(capsys.readouterr().out), on_two_processes(EXAMPLE)
    assert losses(said) == pytest.approx(alone, abs=2e-4)  # it prints four decimals
    assert alone[-1] < alone[0] - 0.1
    assert "gradients of 2 and of one process" in said


class Mortal(Clarabel):
    """Clarabel, whose process is killed at the FATAL task of all that begin in any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def solve(self, task):
        for place in count():
            try:
                (self.folder / str(place)).touch(exist_ok=False)
                break
            except FileExistsError:
                continue
        if place == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().solve(task)


def answers(layer, tensors):
    inputs = leaves(tensors)
    outputs = outputs_of(layer, inputs)
    cotangents = [w.expand_as(o) for w, o in zip(weights(outputs, 1), outputs, strict=True)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, cotangents)]


def same(got, expected):
    assert all(relative(a, b) < 1e-12 for a, b in zip(got, expected, strict=True))


def same_for(executor: Executor) -> None:
    for name in ("quadratic_program", "every_cone"):
        case = CASES[name]
        tensors = case.sample(8, seed=3)
        same(
            answers(case.layer(solver="clarabel", executor=executor), tensors),
            answers(case.layer(solver="clarabel"), tensors),
        )


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip(
        "distributed",
        reason="a cluster of this machine's own is dask's: pip install 'convlayer[distributed]'",
    )
    options = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "processes": True,
        "dashboard_address": ":0",
    }
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.mark.long
def test_a_cluster_gives_the_same_answers(client, monkeypatch):
    executor = client.get_executor()
    with monkeypatch.context() as elsewhere:
        # the cores of this machine are not the cluster's
        elsewhere.setattr(os, "cpu_count", lambda: 17)
        assert workers_of(executor) == 2
    same_for(executor)


@pytest.mark.long
def test_a_cluster_that_loses_a_worker_gives_the_same_answers(client, tmp_path):
    case = CASES["quadratic_program"]
    tensors = case.sample(ROWS, seed=4)
    layer = case.layer(solver=Mortal(tmp_path), executor=client.get_executor())
    same(answers(layer, tensors), answers(case.layer(solver="clarabel"), tensors))
    assert len(list(tmp_path.iterdir())) > TASKS  # what was lost began again


def test_spawned_processes_give_the_same_answers_until_one_dies_and_nothing_is_tried_again(
    tmp_path,
):
    case = CASES["quadratic_program"]
    tensors = case.sample(ROWS, seed=4)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert workers_of(pool) == 2
        same_for(pool)
        layer = case.layer(solver=Mortal(tmp_path), executor=pool)
        said = f"a ProcessPoolExecutor, died.* none of the {ROWS} rows.*with_options"
        with pytest.raises(BrokenExecutor, match=said):
            layer(*tensors)
        begun = len(list(tmp_path.iterdir()))
        assert FATAL < begun <= TASKS
        with pytest.raises(BrokenExecutor, match="Pass a new executor"):
            layer(*tensors)
        assert len(list(tmp_path.iterdir())) == begun
    same(
        answers(layer.with_options(executor=Inline()), tensors),
        answers(case.layer(solver="clarabel"), tensors),
    )


def test_an_executor_that_does_not_say_has_as_many_workers_as_there_are_cores():
    assert workers_of(Executor()) == os.cpu_count()


def test_a_task_travels_without_what_follows_from_the_pattern():
    class Recording(Inline):
        def map(self, function, tasks):
            (self.task,) = tasks
            return super().map(function, [self.task])

    case, recording, stored = (
        CASES["every_cone"],
        Recording(),
        {field.name for field in fields(Program)},
    )
    answers(case.layer(solver="clarabel", executor=recording), case.sample(3, seed=5))
    task = recording.task
    arrived = pickle.loads(pickle.dumps(task))
    assert vars(task.program).keys() > stored
    assert vars(arrived.program).keys() == stored
    for mine, theirs in zip(Clarabel().solve(task), Clarabel().solve(arrived), strict=True):
        assert (mine.x == theirs.x).all()
        assert (mine.y == theirs.y).all()


if __name__ == "__main__":
    compare_gradients()
