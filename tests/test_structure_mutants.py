"""Mutants of the specialised path: a fault is planted in recognition, binding or a kernel, and a
law of the registry must catch it."""

import dataclasses

import numpy as np
import pytest
import structures
import test_audit
import test_normal_form
import test_structures
import torch
from cvxpy.atoms.elementwise.power import Power
from cvxpy.atoms.quad_over_lin import quad_over_lin

import convlayer.declaration.binding
import convlayer.layer
import convlayer.paths.specialised
from convlayer import GradientWarning
from convlayer.declaration.affine import Table
from convlayer.declaration.atoms.absolute import Absolute
from convlayer.declaration.atoms.entropy import Entropy
from convlayer.declaration.atoms.quadratic_form import QuadraticForm
from convlayer.declaration.atoms.square import Square
from convlayer.kernels.answer import Answer
from convlayer.paths.gate import Gate
from convlayer.structures import (
    entropic_optimal_transport,
    equality_constrained_qp,
    leading_eigenspace,
    least_squares,
    softmax,
    sparsemax,
    total_variation,
)

CAUGHT = (AssertionError, GradientWarning, pytest.fail.Exception)
BY_NAME = {str(spelling): spelling for spelling in structures.SPELLINGS}


def caught(law, plant, monkeypatch):
    law()
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(CAUGHT):
            law()


def near_miss(name, miss):
    return lambda: test_structures.test_a_near_miss_falls_through_with_a_reason(f"{name}: {miss}")


def spelling(name):
    return lambda: test_structures.test_a_spelling_is_matched_and_agrees_with_the_cone_program(
        BY_NAME[name]
    )


def first_row(table, size, reason):
    """A matcher that never looks at the other rows."""
    part = table.normal
    keep = part.row == part.row[0]
    return Table(
        1, part.row[keep] * 0, part.variable[keep], part.parameter[keep], part.coefficient[keep]
    )


MATCHERS = {
    "unequal temperatures agree": (softmax, "one_value", first_row, near_miss("softmax", "unequal temperatures")),
    "unequal weights agree": (sparsemax, "one_value", first_row, near_miss("sparsemax", "unequal weights")),
    "unequal steps agree": (total_variation, "one_value", first_row, near_miss("total_variation", "unequal steps")),
    "every order is a line": (
        total_variation, "_line", lambda form: np.arange(form.n), near_miss("total_variation", "a star")),
    "any multiple is a whole one": (
        leading_eigenspace, "_multiple", lambda total, bound: 2,
        near_miss("leading_eigenspace", "a trace that is no whole multiple of the bound")),
    "no constraint is in the way": (least_squares, "no_cones", lambda *a: None, near_miss("least_squares", "a sign")),
    "inequalities are equalities": (
        equality_constrained_qp, "no_cones", lambda *a: None, near_miss("equality_constrained_qp", "an inequality")),
    "caps are signs": (
        entropic_optimal_transport, "signs", lambda form: convlayer.structures.reading.Signs(None, {}, False),
        near_miss("entropic_optimal_transport", "a cap")),
    "unknown atoms are nothing": (softmax, "only", lambda *a: None, near_miss("softmax", "a square beside")),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MATCHERS)
def test_a_matcher_that_agrees_too_easily_is_caught(mutant, monkeypatch):
    module, name, planted, law = MATCHERS[mutant]
    caught(law, lambda patch: patch.setattr(module, name, planted), monkeypatch)


def changed_atom(atom, method, planted):
    return lambda patch: patch.setattr(atom, method, planted)


def objective(name):
    return lambda: (
        test_normal_form.test_the_objective_has_cvxpys_value_and_the_constraints_their_violations(
            BY_NAME[name]
        )
    )


ATOMS = {
    "an absolute value is read as nothing": (
        changed_atom(Absolute, "read", lambda *a: None), near_miss("least_squares", "the l1 norm")),
    "an entropy is read as nothing": (
        changed_atom(Entropy, "read", lambda *a: None), near_miss("equality_constrained_qp", "entropy")),
    "a power is a square": (
        changed_atom(Square, "recognises", lambda self, part: isinstance(part, (Power, quad_over_lin))),
        near_miss("least_squares", "a fourth power")),
    "every quadratic form is a diagonal": (
        changed_atom(QuadraticForm, "read", lambda self, part, weight, terms: terms.keep(
            Square, Table.of_constant(np.ones(part.args[0].size)), terms.reader.table(part.args[0]))),
        objective("equality_constrained_qp-its_multipliers")),
    "half is forgotten": (
        changed_atom(QuadraticForm, "value", lambda self, P, z: (z @ P.unflatten(1, (z.shape[1], -1)) @ z.mT).flatten()),
        objective("equality_constrained_qp-its_multipliers")),
    "rows of weight zero restrict nothing": (
        changed_atom(Entropy, "restricts", False),
        lambda: test_audit.test_whatever_the_spelling_auto_agrees_with_generic("an_entropy_of_weight_zero")),
}  # fmt: skip


@pytest.mark.parametrize("mutant", ATOMS)
def test_an_atom_that_is_misread_is_caught(mutant, monkeypatch):
    plant, law = ATOMS[mutant]
    caught(law, plant, monkeypatch)


def changed_kernel(module, name, change):
    def plant(patch):
        original = getattr(module, name)
        patch.setattr(
            module, name, lambda *arguments, **options: change(original(*arguments, **options))
        )

    return plant


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, bar):
        return -bar


def value_off(answer: Answer) -> Answer:
    return answer.with_outputs(answer.outputs[0] * (1 + 1e-7), *answer.outputs[1:])


def gradient_negated(answer: Answer) -> Answer:
    return answer.with_outputs(Negated.apply(answer.outputs[0]), *answer.outputs[1:])


def duals_negated(answer: Answer) -> Answer:
    return answer.with_outputs(answer.outputs[0], *(-part for part in answer.outputs[1:]))


def everything_flagged(answer: Answer) -> Answer:
    return dataclasses.replace(
        answer, degenerate=torch.ones(len(answer.outputs[0]), dtype=torch.bool)
    )


KERNELS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        entropic_optimal_transport, equality_constrained_qp, leading_eigenspace, least_squares, softmax, sparsemax, total_variation)
}  # fmt: skip


@pytest.mark.parametrize(
    "change", [value_off, gradient_negated, everything_flagged], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_with_a_fault_is_caught(name, change, monkeypatch):
    law = {
        value_off: lambda: (
            test_structures.test_it_agrees_with_the_cone_program_on_random_instances.hypothesis.inner_test(
                name, 1, (2,)
            )
        ),
        gradient_negated: lambda: (
            test_structures.test_the_gradient_of_variables_and_value_is_that_of_five_point_differences(
                name
            )
        ),
        everything_flagged: lambda: test_structures.test_a_batch_equals_a_loop(name),
    }[change]
    caught(law, changed_kernel(KERNELS[name], name, change), monkeypatch)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("equality_constrained_qp-its_multipliers", equality_constrained_qp),
        ("equality_constrained_qp-multipliers_of_a_maximum", equality_constrained_qp),
        ("softmax-one_entropy_at_a_time_and_multipliers", softmax),
        ("sparsemax-multipliers", sparsemax),
    ],
)
def test_multipliers_of_the_wrong_sign_are_caught(name, module, monkeypatch):
    kernel = name.partition("-")[0]
    caught(spelling(name), changed_kernel(module, kernel, duals_negated), monkeypatch)


def test_a_binding_that_forgets_the_transpose_is_caught(monkeypatch):
    original = convlayer.declaration.binding._piece

    def mutant(*arguments):
        piece = original(*arguments)
        transposed = isinstance(piece.source, str) and piece.source == "transposed"
        return dataclasses.replace(piece, source="whole") if transposed else piece

    caught(
        spelling("entropic_optimal_transport-the_plan_transposed_and_scaled"),
        lambda patch: patch.setattr(convlayer.declaration.binding, "_piece", mutant),
        monkeypatch,
    )


def test_a_binding_that_forgets_a_scale_is_caught(monkeypatch):
    original = convlayer.declaration.binding._piece

    def mutant(*arguments):
        return dataclasses.replace(original(*arguments), scale=1.0)

    caught(
        spelling("total_variation-a_weighted_fit_and_a_linear_term"),
        lambda patch: patch.setattr(convlayer.declaration.binding, "_piece", mutant),
        monkeypatch,
    )


def test_an_output_in_the_wrong_order_is_caught(monkeypatch):
    original = convlayer.paths.specialised._output

    def mutant(shape, output, place, scale, size):
        return original(shape, output, place[::-1].copy(), scale, size)

    caught(
        spelling("least_squares-two_variables_stacked"),
        lambda patch: patch.setattr(convlayer.paths.specialised, "_output", mutant),
        monkeypatch,
    )


def test_a_failed_row_with_a_plausible_gradient_is_caught(monkeypatch):
    original = Gate.guard

    def mutant(self, bars):
        return [None if bar is None else bar.nan_to_num(0.0) for bar in original(self, bars)]

    caught(
        lambda: (
            test_structures.test_a_loss_that_uses_a_failed_row_has_a_nan_gradient_there_and_only_there(
                "softmax"
            )
        ),
        lambda patch: patch.setattr(Gate, "guard", mutant),
        monkeypatch,
    )


def test_verify_catches_a_wrong_kernel():
    layer = test_structures.layer_of("least_squares")
    tensors = test_structures.sample("least_squares", (3,))
    assert layer.verify(*tensors).agrees
    run = layer._choice.kernel._run
    layer._choice.kernel._run = lambda values, like, at=None: value_off(run(values, like, at))
    found = layer.verify(*tensors)
    assert found.agrees, "a relative error of 1e-7 is within its tolerance"
    layer._choice.kernel._run = lambda values, like, at=None: gradient_negated(
        run(values, like, at)
    )
    found = layer.verify(*tensors)
    assert not found.agrees
    assert "DISAGREE" in str(found)
