"""What the forward pass keeps, what flows back, and the chain rule between them."""

from funcbp.trace.chain import chain_rule as chain_rule
from funcbp.trace.faults import Fault as Fault
from funcbp.trace.ledger import Ledger as Ledger
from funcbp.trace.ledger import saved as saved
from funcbp.trace.marks import tap as tap
from funcbp.trace.nonfinite import NonFinite as NonFinite
from funcbp.trace.nonfinite import find_nonfinite as find_nonfinite
from funcbp.trace.pass_views import plot_run as plot_run
from funcbp.trace.passes import Pass as Pass
from funcbp.trace.passes import trace as trace
from funcbp.trace.steps import ChainRule as ChainRule
