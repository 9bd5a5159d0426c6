"""funcbp: backpropagation you can read, check and trust, for JAX."""

from funcbp import check as check
from funcbp import layers as layers
from funcbp import ops as ops
from funcbp.case import Case as Case
from funcbp.core import InputError as InputError
from funcbp.core import Op as Op
from funcbp.core import autodiff as autodiff
from funcbp.core import op as op
from funcbp.core import recorded as recorded
