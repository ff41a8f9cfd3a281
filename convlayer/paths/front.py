"""A call, from tensors to the gate: shapes and dtypes, bad rows, the path and what stands around
it, the failure policy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convlayer.autodiff.derivative import EvaluationPoint, Local, solved
from convlayer.autodiff.threads import few_threads
from convlayer.autodiff.torch_internals import at_home, is_transformed
from convlayer.core.maps import Called
from convlayer.declaration import arguments
from convlayer.declaration.declaration import Declaration
from convlayer.declaration.hashing import digest
from convlayer.declaration.inputs import BadRows, bad_rows
from convlayer.notices import OnceEach
from convlayer.paths.choice import Choice
from convlayer.paths.cone_program import ConeProgram
from convlayer.paths.exit import Exit
from convlayer.paths.gate import Gate, flatten_batch, no_autocast
from convlayer.paths.path import Found, Path, Request, Tell
from convlayer.paths.policy import CLOSEST, refuse_bad, refuse_failed
from convlayer.paths.relaxed import Reconciled, Relaxed
from convlayer.paths.rescued import Rescued
from convlayer.paths.settings import Settings
from convlayer.paths.short import Answered, ShortWay
from convlayer.paths.starts import Starts, samples_of, start_of
from convlayer.progress import shown
from convlayer.solution import AccuracyWarning, Cause, GradientWarning, Solution, Status

COLD_IN_TRANSFORMS = "A warm start, or `ids`, cannot be used inside a torch.func transform or with a tangent; leave it out."


@dataclass(frozen=True, eq=False)
class Call:
    """The options of a call."""

    solver_args: Mapping[str, Any] | None = None
    warm_start: Solution | None = None
    ids: Tensor | Sequence[Hashable] | None = None
    everything: bool = False  # the objective and a table of the rows too

    @property
    def is_plain(self) -> bool:
        """It has none of them."""
        return self.solver_args is None and self.warm_start is None and self.ids is None

    @property
    def of_cone_program(self) -> bool:
        """Only the cone program has these."""
        options = self.solver_args is not None and bool(self.solver_args.keys() - {"tolerance"})
        return options or self.warm_start is not None


@dataclass(frozen=True, eq=False)
class Front:
    """All that a call of a layer depends on."""

    choice: Choice
    settings: Settings
    on_failure: str
    validate: bool
    verbose: bool
    executor: Executor | None
    short: ShortWay | None
    starts: Starts
    told: OnceEach
    names: dict[Any, str]  # in graphs, by the options that may change

    @property
    def declared(self) -> Declaration:
        """With the parameters and variables in the layer's order."""
        return self.choice.declared

    @property
    def graph_name(self) -> str:
        """The content of the layer, the same in every process; see `compiled.Served`."""
        changing = self.on_failure, self.validate
        if changing not in self.names:
            content = self.choice.structure, self.settings.content
            self.names[changing] = digest(self.declared.digest, *content, changing)
        return self.names[changing]

    def evaluated(
        self, thetas: Sequence[Tensor], ids: Tensor | None, differentiable: bool
    ) -> tuple[list[Tensor], Local]:
        """See `compiled.Served`."""
        gate = self.apart(thetas, Call(ids=ids), differentiable)
        return gate.filled, gate.local

    def blank(self, thetas: Sequence[Tensor]) -> list[Tensor]:
        """See `compiled.Served`."""
        dtype, device, batch = self.shapes(thetas)
        variables = self.declared.variables
        return [torch.empty(*batch, *v.shape, dtype=dtype, device=device) for v in variables]

    def given(self, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """One value for each parameter, in order, as tensors where that is harmless."""
        if not named and all(isinstance(value, Tensor) for value in given):
            return given
        parameters = self.declared.parameters
        return arguments.tensors(parameters, arguments.ordered(parameters, given, named))

    def shapes(self, tensors: Sequence[Any]) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
        """The outputs' dtype and device, and the batch shape."""
        parameters = self.declared.parameters
        batch = arguments.batch_shape(parameters, tensors)
        return *arguments.dtype_and_device(parameters, tensors), batch

    def values(self, tensors: Sequence[Tensor], batch: tuple[int, ...]) -> list[Tensor]:
        """(*own batch, *shape) -> (B or 1, *shape) of each parameter."""
        return [
            flatten_batch(t, p, batch)
            for t, p in zip(tensors, self.declared.parameters, strict=True)
        ]

    def run(
        self, tensors: tuple[Tensor, ...], call: Call
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Exit, bool]:
        """The outputs; with `everything` the objective too, and status, iterations, residual,
        degenerate and margin of the rows. Last whether a next call may start from what was found.
        """
        if not is_transformed(tensors):
            recorded = torch.is_grad_enabled()
            wanted = [recorded and isinstance(t, Tensor) and t.requires_grad for t in tensors]
            with at_home():
                way_out = self._way_out(tensors, call, wanted)
                table = way_out.table() if call.everything else ()
                return way_out.leave(tensors), table, way_out, True
        if call.ids is not None or call.warm_start is not None:
            raise RuntimeError(COLD_IN_TRANSFORMS)
        ways_out: list[Exit] = []

        def solve(
            thetas: Sequence[Tensor], differentiable: bool
        ) -> tuple[list[Tensor], tuple[Tensor, ...], Local]:
            way_out = self.apart(thetas, call, differentiable)
            ways_out.append(way_out)
            return way_out.filled, way_out.table() if call.everything else (), way_out.local

        self.shapes(tensors)
        point = EvaluationPoint([len(p.shape) for p in self.declared.parameters], solve)
        outputs = solved(point, tensors)
        return outputs[: point.outputs], outputs[point.outputs :], ways_out[0], False

    def solution(self, tensors: tuple[Tensor, ...], call: Call) -> Solution:
        """All that there is to say of a call with `everything`."""
        outputs, table, way_out, plain = self.run(tensors, call)
        status, iterations, residual, degenerate, margin = table
        return Solution(
            outputs[:-1],
            outputs[-1],
            status,
            iterations,
            residual,
            degenerate,
            margin,
            way_out.notes,
            way_out.shifts,
            way_out.iterate if plain else None,
        )

    def apart(self, thetas: Sequence[Tensor], call: Call, differentiable: bool) -> Exit:
        """Solved on plain tensors apart from every graph, with what its derivatives need."""
        return self._way_out(thetas, call, [differentiable] * len(thetas))

    def taken_over(self, tensors: Sequence[Tensor], everything: bool, called: Called) -> Gate:
        """See `short.Long`."""
        return self._long(tensors, Call(everything=everything), [True] * len(tensors), called)

    def teller(self, batch: tuple[int, ...]) -> Tell:
        """See `short.Long`."""
        return partial(self._tell, batch)

    def _way_out(self, tensors: Sequence[Tensor], call: Call, wanted: list[bool]) -> Exit:
        """wanted: the parameters that derivatives are taken in."""
        if self.short is None or not call.is_plain:
            return self._long(tensors, call, wanted, None)
        found = self.short(self, tensors, call.everything, any(wanted), self.validate)
        return found if isinstance(found, Answered) else self._long(tensors, call, wanted, found)

    def _long(
        self, tensors: Sequence[Any], call: Call, wanted: list[bool], called: Called | None
    ) -> Gate:
        # Leaves of a graph of the layer's own, to be differentiated as they are.
        leaves = tuple(
            t.detach().requires_grad_(want) if isinstance(t, Tensor) else t
            for t, want in zip(tensors, wanted, strict=True)
        )
        with torch.set_grad_enabled(any(wanted)):
            return self._solved(leaves, call, called)

    def _solved(self, tensors: tuple[Tensor, ...], call: Call, called: Called | None) -> Gate:
        """Check the values, ask the path, apply the failure policy."""
        dtype, device, batch = self.shapes(tensors)
        values, kernel = self.values(tensors, batch), self.choice.kernel
        # but for what the cone program does on its own threads
        operations = float(sum(value.numel() for value in values))
        if kernel is not None:
            operations += kernel.operations(max((len(value) for value in values), default=1))
        tell = self.teller(batch)
        watched = shown() if self.verbose else nullcontext()
        with no_autocast(device), few_threads(operations), watched:
            cone_program = kernel is None or call.of_cone_program
            vouched = frozenset() if cone_program or kernel is None else kernel.match.vouches
            start = None
            if call.warm_start is not None:
                start = start_of(call.warm_start, batch, self.declared.canonical.program)
            request = Request(
                values,
                math.prod(batch),
                dtype,
                tell,
                bad=self._bad_rows(values, batch, vouched),
                look_closer=partial(self._bad_rows, values, batch),
                everything=call.everything,
                solver_args=call.solver_args,
                start=start,
                called=called,
                samples=samples_of(call.ids, batch),
            )
            found = self._path(cone_program)(request)
            self._judge(found, request, batch)
            fill = self.on_failure == "nan"
            return Gate.of(
                found, values, tensors, self.declared.parameters, batch, dtype, device, tell, fill
            )

    def _path(self, cone_program: bool) -> Path:
        """The path that was chosen, or the cone program, with what stands around it."""
        declared, solving, gradient = self.declared, self.settings.solving, self.settings.gradient
        path: Path = ConeProgram(declared, solving, gradient, self.executor, self.starts)
        if not cone_program:
            assert self.choice.kernel is not None
            path = Rescued(self.choice.kernel, path)
        if gradient.name == "exact":
            path = Reconciled(path, declared, solving.tolerance)
        if self.on_failure in CLOSEST:
            path = Relaxed(path, declared, solving.tolerance, few=self.on_failure == "closest_few")
        return path

    def _bad_rows(
        self, values: list[Tensor], batch: tuple[int, ...], vouched: frozenset[int] = frozenset()
    ) -> BadRows:
        """ParameterError, if that is the policy."""
        bad = bad_rows(self.declared, values, math.prod(batch), self.validate, vouched)
        return refuse_bad(bad, self.on_failure, batch)

    def _judge(self, found: Found, request: Request, batch: tuple[int, ...]) -> None:
        """Warn of rows that are inaccurate, and raise for those that failed, if that is the
        policy."""
        if found.verdict is None or not bool(found.verdict.status.any()):
            return
        inaccurate = torch.nonzero(found.verdict.status == Status.INACCURATE).flatten()
        if len(inaccurate):
            self.told(AccuracyWarning.of(inaccurate, batch))
        details = {**found.details, **request.bad.details}
        refuse_failed(self.declared, request.values, found.verdict, details, self.on_failure, batch)

    def _tell(
        self, batch: tuple[int, ...], rows: Tensor, cause: Cause, parameters: Sequence[int]
    ) -> None:
        names = [self.declared.parameters[k].name() for k in parameters]
        self.told(GradientWarning.of(rows, batch, cause, names), cause)
