"""What the forward pass keeps, what flows back, and the chain rule between them."""

from funcbp.trace.chain import chain_rule as chain_rule
from funcbp.trace.steps import ChainRule as ChainRule
