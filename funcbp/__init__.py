"""funcbp: backpropagation you can read, check and trust, for JAX."""

from funcbp import check as check
from funcbp import layers as layers
from funcbp import ops as ops
from funcbp.case import Case as Case
from funcbp.check import audit as audit
from funcbp.check import check_rule as check_rule
from funcbp.check import surrogate as surrogate
from funcbp.core import InputError as InputError
from funcbp.core import Op as Op
from funcbp.core import autodiff as autodiff
from funcbp.core import op as op
from funcbp.core import recorded as recorded
from funcbp.trace import chain_rule as chain_rule
from funcbp.trace import find_nonfinite as find_nonfinite
from funcbp.trace import plot_run as plot_run
from funcbp.trace import saved as saved
from funcbp.trace import tap as tap
from funcbp.trace import trace as trace
