"""Mutants: a fault is planted in the package, and a law of this suite must catch it."""

import dataclasses
import math

import cvxpy as cp
import numpy as np
import pytest
import test_batches
import test_canon
import test_degenerate
import test_failure
import test_gradient
import test_solvers
import torch
from cases import CASES

import convlayer.conic.elimination
import convlayer.conic.kinks
import convlayer.conic.kkt_base
import convlayer.conic.polish
import convlayer.conic.residual
import convlayer.declaration.canonical
import convlayer.declaration.canonicalise
import convlayer.declaration.declaration
import convlayer.paths.cone_derivative
import convlayer.paths.cone_solution
import convlayer.paths.gate
import convlayer.paths.pieces
import convlayer.paths.refined
import convlayer.solvers.scs
from convlayer import AccuracyWarning, GradientWarning
from convlayer.cones import ProductSpectrum
from convlayer.cones.cone import from_basis, to_basis
from convlayer.paths.cone_derivative import ConeDerivative

# A mutant that merely crashes proves nothing: the law itself must object, or the package notice.
CAUGHT = (AssertionError, AccuracyWarning, GradientWarning)


def fresh(name):
    """A case whose layer is built anew, so that a mutant of the canonicalisation is in it."""
    case = CASES[name]
    case.__dict__.pop("shared", None)
    return case


def gradient_law(name):
    return lambda: (
        test_gradient.test_the_gradient_of_variables_duals_and_value_is_that_of_five_point_differences(
            fresh(name)
        )
    )


def adjoint_sign(patch):
    original = convlayer.paths.pieces.adjoint
    patch.setattr(
        convlayer.paths.pieces, "adjoint", lambda *a: tuple(-part for part in original(*a))
    )


def adjoint_sign_of_the_dual_part(patch):
    original = convlayer.paths.pieces.adjoint

    def mutant(*arguments):
        w, u = original(*arguments)
        return w, -u

    patch.setattr(convlayer.paths.pieces, "adjoint", mutant)


def pulled_back(change):
    """Both ways in which the cotangents of P and A are made: at the entries that move, and of whole
    matrices."""

    def plant(patch):
        entries, whole = (
            convlayer.paths.cone_derivative.pull_back,
            convlayer.paths.cone_derivative.pull_back_whole,
        )

        def by_entries(name, program, moving, x, y, w, u):
            return change(
                lambda *vectors: entries(name, program, moving, *vectors), name, x, y, w, u
            )

        def of_whole(name, x, y, w, u):
            return change(lambda *vectors: whole(name, *vectors), name, x, y, w, u)

        patch.setattr(convlayer.paths.cone_derivative, "pull_back", by_entries)
        patch.setattr(convlayer.paths.cone_derivative, "pull_back_whole", of_whole)

    return plant


def transpose_dropped(original, name, x, y, w, u):
    return original(x, y, w, torch.zeros_like(u) if name == "A" else u)


def half_of_the_quadratic(original, name, *vectors):
    return original(*vectors) / (2 if name == "P" else 1)


def quadratic_not_symmetrised(original, name, x, y, w, u):
    return (
        original(x * (torch.arange(x.shape[1]) % 2), y, w, u) * 2
        if name == "P"
        else original(x, y, w, u)
    )


def derivative_of_the_projection_is_the_identity(patch):
    original = ProductSpectrum.__init__
    patch.setattr(
        ProductSpectrum,
        "__init__",
        lambda self, values, bases=(): original(
            self, torch.where(values > 0, 1.0, 0.0).to(values), bases
        ),
    )


def basis_transposed(patch):
    patch.setattr(
        ProductSpectrum,
        "to_basis",
        lambda self, x, columns=False: self._rotate(x, columns, from_basis),
    )
    patch.setattr(
        ProductSpectrum,
        "from_basis",
        lambda self, x, columns=False: self._rotate(x, columns, to_basis),
    )


def cotangents_of_y_ignored(patch):
    original = convlayer.paths.pieces.adjoint
    patch.setattr(
        convlayer.paths.pieces,
        "adjoint",
        lambda zero, x_bar, y_bar: original(zero, x_bar, torch.zeros_like(y_bar)),
    )


def scaling_of_the_adjoint_lost(patch):
    patch.setattr(
        convlayer.conic.residual.Scaling,
        "leave_adjoint",
        lambda self, w, u: (self.tau * w, self.rho * u),
    )


def cotangent_of_an_eliminated_variable_lost(patch):
    original = convlayer.conic.elimination.Eliminated.enter_cotangents
    patch.setattr(
        convlayer.conic.elimination.Eliminated,
        "enter_cotangents",
        lambda self, x_bar, y_bar: original(self, 0 * x_bar + x_bar.mean(), y_bar),
    )


def adjoint_of_an_eliminated_row_lost(patch):
    original = convlayer.conic.elimination.Eliminated.leave_adjoint
    patch.setattr(
        convlayer.conic.elimination.Eliminated,
        "leave_adjoint",
        lambda self, w, u, *bars: (lambda w, u: (w, 0 * u))(*original(self, w, u, *bars)),
    )


def objective_sign(patch):
    patch.setattr(
        convlayer.declaration.canonical.Canonical,
        "objective",
        lambda self, value: value if not self.gp else value.exp(),
    )


def value_without_its_gradient(patch):
    original = ConeDerivative.cotangent

    def mutant(self, entries, bars, *rest):
        return original(self, entries, [*bars[:2], torch.zeros_like(bars[2])], *rest)

    patch.setattr(ConeDerivative, "cotangent", mutant)


def symmetry_lost(patch):
    original = convlayer.declaration.canonicalise.ParameterEntries
    patch.setattr(
        convlayer.declaration.canonicalise,
        "ParameterEntries",
        lambda shape, symmetric, log: original(shape, False, log),
    )


def polish_skipped(patch):
    polish = convlayer.conic.polish
    patch.setattr(polish, "NEWTON", dataclasses.replace(polish.NEWTON, steps=0))
    patch.setattr(polish, "PATH", dataclasses.replace(polish.PATH, steps=0))


GRADIENT = {
    "the adjoint's sign flipped": (adjoint_sign, "quadratic_program"),
    "the sign of its dual part flipped": (adjoint_sign_of_the_dual_part, "quadratic_program"),
    "a transpose dropped in pull_back": (pulled_back(transpose_dropped), "linear_program"),
    "half of dP": (pulled_back(half_of_the_quadratic), "equality_qp"),
    "dP not symmetrised": (pulled_back(quadratic_not_symmetrised), "free_quadratic"),
    "D replaced by I on a psd cone": (derivative_of_the_projection_is_the_identity, "spectraplex"),
    "D replaced by I on a second-order cone": (
        derivative_of_the_projection_is_the_identity,
        "norm_ball",
    ),
    "D replaced by I on an exponential cone": (
        derivative_of_the_projection_is_the_identity,
        "entropy",
    ),
    "D replaced by I on a power cone": (derivative_of_the_projection_is_the_identity, "raw_power"),
    "the basis transposed": (basis_transposed, "nearest_correlation"),
    "cotangents of y ignored": (cotangents_of_y_ignored, "quadratic_program"),
    "the scaling of the adjoint lost": (scaling_of_the_adjoint_lost, "linear_program"),
    "the cotangent of an eliminated variable lost": (
        cotangent_of_an_eliminated_variable_lost,
        "nonnegative_least_squares",
    ),
    "the adjoint of an eliminated row lost": (
        adjoint_of_an_eliminated_row_lost,
        "nonnegative_least_squares",
    ),
    "the value's own gradient lost": (value_without_its_gradient, "concave_quadratic"),
}


@pytest.mark.parametrize("mutant", GRADIENT)
def test_the_law_of_differences_catches(mutant, monkeypatch):
    plant, name = GRADIENT[mutant]
    gradient_law(name)()
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(CAUGHT):
            gradient_law(name)()
    fresh(name)


def caught(law, plant, monkeypatch, *names):
    law()
    with monkeypatch.context() as patch:
        plant(patch)
        for name in names:
            fresh(name)
        with pytest.raises(CAUGHT):
            law()
    for name in names:
        fresh(name)


def test_a_shared_gradient_that_is_a_mean_is_caught(monkeypatch):
    """The defect of a well-known QP layer."""
    original = ConeDerivative.cotangent

    def mutant(self, *arguments):
        return [bar / len(self.x) if len(bar) == 1 else bar for bar in original(self, *arguments)]

    caught(
        lambda: test_batches.test_a_shared_parameters_gradient_is_the_sum_over_rows(
            CASES["quadratic_program"]
        ),
        lambda patch: patch.setattr(ConeDerivative, "cotangent", mutant),
        monkeypatch,
    )


def test_rows_that_are_swapped_are_caught(monkeypatch):
    original = convlayer.paths.cone_solution._solved

    def mutant(*arguments):
        found, blank = original(*arguments)
        return dataclasses.replace(found, x=found.x.flip(0)), blank

    caught(
        lambda: test_batches.test_a_batch_equals_a_loop_in_value_and_gradient(
            CASES["linear_program"]
        ),
        lambda patch: patch.setattr(convlayer.paths.cone_solution, "_solved", mutant),
        monkeypatch,
    )


def test_the_sign_of_a_maximum_is_caught(monkeypatch):
    caught(
        lambda: test_gradient.test_the_value_is_the_users_objective_at_the_users_variables(
            CASES["concave_quadratic"]
        ),
        objective_sign,
        monkeypatch,
    )


def test_a_symmetric_parameter_read_from_one_triangle_is_caught(monkeypatch):
    caught(
        lambda: (
            test_gradient.test_a_symmetric_parameter_has_a_symmetric_gradient_that_is_right_along_every_symmetric_direction(
                fresh("spectraplex")
            )
        ),
        symmetry_lost,
        monkeypatch,
        "spectraplex",
    )


def test_an_answer_that_is_not_polished_is_caught(monkeypatch):
    caught(
        lambda: test_gradient.test_the_recomputed_kkt_residual_vanishes_on_cvxpys_own_cone_program(
            CASES["every_cone"]
        ),
        polish_skipped,
        monkeypatch,
    )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_order_of_a_psd_cone_in_scs_is_caught(n, monkeypatch):
    """Orders one and two are alike in both orders but for the diagonal; three and more differ
    everywhere."""

    def plant(patch):
        patch.setattr(convlayer.solvers.scs, "svec_order", lambda program: np.arange(program.m))

    def law():
        test_solvers.test_a_solvers_own_point_is_nearly_optimal_in_our_convention_before_any_polish(
            convlayer.solvers.scs.SCS, n
        )

    if n == 2:
        law()
        with monkeypatch.context() as patch:
            plant(patch)
            law()
        return
    caught(law, plant, monkeypatch)


def test_an_absolute_zero_test_of_a_small_loss_is_caught(monkeypatch):
    """The incumbent's: a cotangent below a fixed size counts as zero."""
    original = convlayer.paths.pieces.adjoint

    def mutant(zero, x_bar, y_bar):
        return original(
            zero,
            torch.where(x_bar.abs() > 1e-8, x_bar, 0.0),
            torch.where(y_bar.abs() > 1e-8, y_bar, 0.0),
        )

    caught(
        lambda: test_gradient.test_a_scaled_loss_scales_the_gradient_exactly(CASES["lasso"], 1e-9),
        lambda patch: patch.setattr(convlayer.paths.pieces, "adjoint", mutant),
        monkeypatch,
    )


def test_a_failed_row_with_a_gradient_of_zero_is_caught(monkeypatch):
    def mutant(bar, batch):
        return torch.zeros(math.prod(batch), dtype=torch.bool)

    caught(
        lambda: test_failure.test_a_failed_row_that_the_loss_uses_has_a_gradient_of_nan(
            "nan", "variable", "infeasible"
        ),
        lambda patch: patch.setattr(convlayer.paths.gate, "_used", mutant),
        monkeypatch,
    )


def test_a_failed_row_that_is_called_solved_is_caught(monkeypatch):
    caught(
        lambda: test_failure.test_a_row_that_neither_solver_nor_polish_settles_is_named(
            monkeypatch
        ),
        lambda patch: patch.setattr(
            convlayer.paths.refined,
            "_verdict",
            lambda zero, *_: torch.zeros(len(zero.x), dtype=torch.int64),
        ),
        monkeypatch,
    )


def test_a_kink_that_is_not_flagged_is_caught(monkeypatch):
    caught(
        test_degenerate.test_a_weakly_active_bound_is_flagged_and_counts_as_inactive,
        lambda patch: patch.setattr(convlayer.conic.kinks, "MOVED", float("inf")),
        monkeypatch,
    )


def test_a_flag_on_what_is_harmless_is_caught(monkeypatch):
    def plant(patch):
        patch.setattr(
            convlayer.conic.kkt_base.KKTSystem,
            "_harmful",
            lambda self, rows, *rest: torch.ones(len(rows), dtype=torch.bool),
        )
        patch.setattr(convlayer.paths.refined, "judged", lambda zero, rows, sides: zero)

    caught(
        test_degenerate.test_redundant_equalities_without_parameters_are_harmless,
        plant,
        monkeypatch,
    )


def test_a_recovery_in_the_wrong_order_is_caught(monkeypatch):
    original = convlayer.declaration.canonicalise._recovery

    def mutant(variable, *arguments):
        recovery = original(variable, *arguments)
        return dataclasses.replace(recovery, position=recovery.position.flip(0))

    caught(
        lambda: test_canon.test_variables_and_duals_are_recovered_as_cvxpy_does(
            fresh("least_norm")
        ),
        lambda patch: patch.setattr(convlayer.declaration.canonicalise, "_recovery", mutant),
        monkeypatch,
        "least_norm",
    )


def test_a_constraint_that_is_dropped_is_caught(monkeypatch):
    """An accelerated peer drops x >= 0 without a word: the problem handed on is not the user's."""

    def plant(patch):
        original = convlayer.declaration.canonicalise.canonicalise

        def mutant(problem, *arguments, checked=None, **named):
            return original(
                cp.Problem(problem.objective, problem.constraints[:-1]), *arguments, **named
            )

        patch.setattr(convlayer.declaration.declaration, "canonicalise", mutant)

    caught(
        lambda: test_gradient.test_variables_duals_and_value_are_those_of_cvxpys_own_solve(
            fresh("three_dimensional")
        ),
        plant,
        monkeypatch,
        "three_dimensional",
    )
