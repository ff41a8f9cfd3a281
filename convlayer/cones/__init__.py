"""Cones: Euclidean projections and their derivatives as spectra, batched, in torch.

Cone, Spectrum                               what a cone answers, and the derivative as basis and values
Zero, Nonnegative, SecondOrder, Psd,
Exponential, Power                           one cone each
svec, smat                                   symmetric matrices as vectors, for Psd
Product, ProductSpectrum, Block              many cones in row order, and their dual
"""

from convlayer.cones.cone import Cone, Spectrum
from convlayer.cones.exponential import Exponential
from convlayer.cones.nonnegative import Nonnegative
from convlayer.cones.power import Power
from convlayer.cones.product import Block, Product, ProductSpectrum
from convlayer.cones.psd import Psd, smat, svec
from convlayer.cones.second_order import SecondOrder
from convlayer.cones.zero import Zero

__all__ = [
    "Block",
    "Cone",
    "Exponential",
    "Nonnegative",
    "Power",
    "Product",
    "ProductSpectrum",
    "Psd",
    "SecondOrder",
    "Spectrum",
    "Zero",
    "smat",
    "svec",
]
