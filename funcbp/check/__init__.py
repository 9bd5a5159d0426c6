"""Are the gradients right? Rules compared with autodiff, both against float64."""

from funcbp.check.compare import Comparison as Comparison
from funcbp.check.compare import Row as Row
from funcbp.check.compare import WrongRule as WrongRule
from funcbp.check.compare import compare as compare
from funcbp.check.compare import saved_bytes as saved_bytes
