"""What convlayer takes of CVXPY beside its documented interface, all of it here: a new version of
CVXPY is checked against this list.

Atoms and constraints are classes that an expression's parts are instances of; reductions are the
stages by which CVXPY makes a cone program. `tests/test_architecture.py` holds that no other module
reaches inside.
"""

from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.broadcast_to import broadcast_to
from cvxpy.atoms.affine.concatenate import Concatenate
from cvxpy.atoms.affine.cumsum import cumsum
from cvxpy.atoms.affine.diag import diag_mat, diag_vec
from cvxpy.atoms.affine.hstack import Hstack
from cvxpy.atoms.affine.index import index, special_index
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.reshape import reshape
from cvxpy.atoms.affine.sum import Sum
from cvxpy.atoms.affine.transpose import transpose
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.affine.upper_tri import upper_tri
from cvxpy.atoms.affine.vstack import Vstack
from cvxpy.atoms.atom import Atom
from cvxpy.atoms.elementwise.abs import abs as CvxpyAbsolute  # noqa: N812  # a class
from cvxpy.atoms.elementwise.entr import entr
from cvxpy.atoms.elementwise.kl_div import kl_div
from cvxpy.atoms.elementwise.power import Power
from cvxpy.atoms.elementwise.rel_entr import rel_entr
from cvxpy.atoms.norm1 import norm1
from cvxpy.atoms.pnorm import Pnorm
from cvxpy.atoms.quad_form import QuadForm, SymbolicQuadForm
from cvxpy.atoms.quad_over_lin import quad_over_lin
from cvxpy.constraints import PowConeND, SvecPSD
from cvxpy.constraints.constraint import Constraint
from cvxpy.constraints.nonpos import Inequality, NonNeg, NonPos
from cvxpy.constraints.psd import PSD
from cvxpy.constraints.zero import Equality, Zero
from cvxpy.expressions.leaf import Leaf
from cvxpy.lin_ops import lin_utils
from cvxpy.problems.objective import Objective
from cvxpy.problems.problem_form import make_problem_form
from cvxpy.reductions.canonicalization import Canonicalization
from cvxpy.reductions.cvx_attr2constr import CvxAttr2Constr, lower_value
from cvxpy.reductions.dcp2cone.cone_matrix_stuffing import ConeMatrixStuffing
from cvxpy.reductions.dcp2cone.dcp2cone import Dcp2Cone
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from cvxpy.reductions.inverse_data import InverseData
from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import CLARABEL
from cvxpy.reductions.solvers.solver_inverse_data import SolverInverseData
from cvxpy.reductions.solvers.solving_chain import _build_solving_chain as build_solving_chain
from cvxpy.reductions.solvers.solving_chain_utils import get_canon_backend
from cvxpy.reductions.utilities import lower_equality, lower_ineq_to_nonneg
from cvxpy.utilities import scopes
from cvxpy.utilities.coeff_extractor import CoeffExtractor

__all__ = [
    "CLARABEL",
    "PSD",
    "AddExpression",
    "Atom",
    "Canonicalization",
    "CoeffExtractor",
    "Concatenate",
    "ConeMatrixStuffing",
    "Constraint",
    "CvxAttr2Constr",
    "CvxpyAbsolute",
    "Dcp2Cone",
    "Dgp2Dcp",
    "DivExpression",
    "Equality",
    "Hstack",
    "Inequality",
    "InverseData",
    "Leaf",
    "MulExpression",
    "NegExpression",
    "NonNeg",
    "NonPos",
    "Objective",
    "Pnorm",
    "PowConeND",
    "Power",
    "Promote",
    "QuadForm",
    "SolverInverseData",
    "Sum",
    "SvecPSD",
    "SymbolicQuadForm",
    "Vstack",
    "Zero",
    "broadcast_to",
    "build_solving_chain",
    "cumsum",
    "diag_mat",
    "diag_vec",
    "entr",
    "get_canon_backend",
    "index",
    "kl_div",
    "lin_utils",
    "lower_equality",
    "lower_ineq_to_nonneg",
    "lower_value",
    "make_problem_form",
    "multiply",
    "norm1",
    "quad_over_lin",
    "rel_entr",
    "reshape",
    "scopes",
    "special_index",
    "transpose",
    "upper_tri",
]
