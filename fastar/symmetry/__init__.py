"""Axes of a network's parameters that are permuted together, derived from its graph and proven."""

from fastar.symmetry.arrangement import Arrangement
from fastar.symmetry.certificate import Certificate, Held, Missed, certify
from fastar.symmetry.derive import derive_symmetry, symmetry_by_settings
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.random_network import ExampleInputs
from fastar.symmetry.same_function import TIE_ALIKE, check_same_function, check_ties
from fastar.symmetry.spec import PermutationSpec, Span
from fastar.symmetry.symmetry import Group, Member, Symmetry, without_groups
from fastar.symmetry.verify import verify_symmetry
