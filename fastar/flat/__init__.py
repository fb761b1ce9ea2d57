"""A module's parameters, and their gradients, as views of one contiguous buffer.

A network is one row of floats: `FlatLayout` says where each parameter lies in it, `FlatParameters` makes a module live
in such a row (fp32 training in place), and `WorkingWeights` makes it live in a second one that is written afresh each
step (the star step, and AMP), while the caller keeps the fp32 master row.
"""

from fastar.flat.layout import FlatEntry, FlatLayout, mean_row
from fastar.flat.parameters import FlatParameters, WorkingWeights, check_kernels
