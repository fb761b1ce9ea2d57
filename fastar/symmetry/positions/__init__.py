"""Positions along tensors' axes, and which of them have to be permuted together: constraints, and their solution.

A position is an index along an axis of a tensor, or a tuple of indices along several. Positions that move together are
one unit.
"""

from fastar.symmetry.positions.constraints import Array, Constraints
from fastar.symmetry.positions.solution import Solution, Units, different_pairs, solve

__all__ = ["Array", "Constraints", "Solution", "Units", "different_pairs", "solve"]
