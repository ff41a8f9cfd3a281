"""Versions, processor, devices, and self-checks: does every path compute what it should on this
machine?"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from threadpoolctl import threadpool_info

from convlayer import __version__, problems
from convlayer.core.library import SWITCH, state
from convlayer.layer import ConvexLayer
from convlayer.report.verification import verify
from convlayer.solvers import SOLVERS
from convlayer.structures import STRUCTURES

DEVELOPMENT = "dev"  # the extra of those who work on the package itself
SETTINGS = (
    "OMP_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "CUDA_VISIBLE_DEVICES",
    SWITCH,
)
BATCH = 8
STEP, TOLERANCE = 1e-6, 1e-6  # of the differences, and of the gradient against them


def examine() -> int:
    """Print it all; 0 if every check passes, 1 otherwise."""
    print(f"{'convlayer':<14}{__version__}, in {Path(__file__).parent}")
    print(f"{'python':<14}{platform.python_version()}, {platform.platform()}")
    for name, optional in _dependencies().items():
        print(
            f"{name:<14}{_version(name) or ('not installed (optional)' if optional else 'MISSING')}"
        )
    print(
        f"{'processor':<14}{_processor()}; torch computes for {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"{'cores':<14}{os.cpu_count()}; torch uses {torch.get_num_threads()} threads")
    print(f"{'compiled':<14}{state()}")
    for line in _blas():
        print(f"{'blas':<14}{line}")
    given = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    print(f"{'environment':<14}{', '.join(given) or 'nothing set that matters'}")
    for line in _devices():
        print(f"{'device':<14}{line}")
    print()
    passed = [_check_structure(name) for name in STRUCTURES]
    passed += [_check_solver(name) for name in SOLVERS if name != "clarabel"]
    passed.append(_check_differences())
    failures = passed.count(False)
    print(f"\n{len(passed) - failures} of {len(passed)} checks passed.")
    return 1 if failures else 0


def _dependencies() -> dict[str, bool]:
    """By name whether it is optional, as the package's own metadata have it."""
    found: dict[str, bool] = {}
    for wanted in requires("convlayer") or ():
        name, extra = re.match(r"[\w.-]+", wanted), re.search(r"extra\s*==\s*[\"']([\w-]+)", wanted)
        if name and (extra is None or extra.group(1) != DEVELOPMENT):
            found[name.group()] = found.get(name.group(), True) and extra is not None
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Its model, by the name that its maker gave it where the system tells."""
    told = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", told.read_text()) if told.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def _blas() -> Iterator[str]:
    """Torch's, which it was built with, and those of NumPy and SciPy, which are loaded."""
    built = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", built)
    mkl = re.search(r"Math Kernel Library Version (\S+)", built)
    yield f"torch: {name.group(1) if name else 'unknown'}{f' {mkl.group(1)}' if mkl else ''}"
    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            kind = f" for {pool['architecture']}" if pool.get("architecture") else ""
            owner = Path(pool["filepath"]).parent.name.partition(".")[0]
            yield f"{owner}: {pool['internal_api']} {pool['version']}{kind}, threads: {pool['num_threads']}"


def _devices() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "cpu; no CUDA device"
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        yield f"cuda:{k}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _check_structure(name: str) -> bool:
    """The structure's own problem on its path and on the cone program."""
    try:
        layer = ConvexLayer(*STRUCTURES[name].declare())
        tensors = STRUCTURES[name].sample((BATCH,), torch.Generator().manual_seed(0))
        found = layer.verify(*tensors)
    except Exception as error:
        return _say(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
    if layer.structure != name:
        return _say(name, False, f"its own problem takes the path {layer.structure}")
    worst = {
        part: float(getattr(found, part).max())
        for part in ("solution", "value", "gradient", "infeasibility")
    }
    return _say(
        name,
        found.agrees,
        ", ".join(f"{part} {size:.0e}" for part, size in worst.items()) + " from the cone program",
    )


def _check_solver(name: str) -> bool:
    """A quadratic program by this solver and by the default one."""
    tensors = problems.quadratic_program.sample(BATCH, 0)
    mine, default = (
        problems.quadratic_program.layer(solver=solver).solve for solver in (name, "clarabel")
    )
    try:
        found = verify(
            name, mine, default, tensors, 1, torch.zeros(BATCH, dtype=torch.float64), seed=0
        )
    except Exception as error:
        return _say(name, False, f"{type(error).__name__}: {error}".splitlines()[0])
    worst = {part: float(getattr(found, part).max()) for part in ("solution", "value", "gradient")}
    return _say(name, found.agrees, _listed(worst) + " from clarabel")


def _check_differences() -> bool:
    """The cone program's gradient against central differences along a random direction."""
    layer = problems.lasso.layer(structure="generic")
    tensors = [t.requires_grad_() for t in problems.lasso.sample(BATCH, 0)]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]

    def loss(step: float) -> torch.Tensor:
        (x,) = layer(*[t + step * d for t, d in zip(tensors, directions, strict=True)])
        return x.square().sum()

    gradients = torch.autograd.grad(loss(0.0), tensors)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    with torch.no_grad():
        difference = float(loss(STEP) - loss(-STEP)) / (2 * STEP)
    deviation = abs(slope - difference) / abs(difference)
    return _say(
        "cone_program", deviation < TOLERANCE, f"gradient {deviation:.0e} from central differences"
    )


def _listed(worst: dict[str, float]) -> str:
    return ", ".join(f"{part} {size:.0e}" for part, size in worst.items())


def _say(name: str, passed: bool, words: str) -> bool:
    print(f"{'ok' if passed else 'FAILED':<8}{name:<28}{words}")
    return passed
