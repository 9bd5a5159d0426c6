"""Are the gradients right? Rules compared with autodiff, and audited; both against float64."""

from funcbp.check.audit import audit as audit
from funcbp.check.audit import check_rule as check_rule
from funcbp.check.audit import surrogate as surrogate
from funcbp.check.compare import Comparison as Comparison
from funcbp.check.compare import Row as Row
from funcbp.check.compare import WrongRule as WrongRule
from funcbp.check.compare import compare as compare
from funcbp.check.compare import saved_bytes as saved_bytes
from funcbp.check.diagnose import CAUSES as CAUSES
from funcbp.check.finding import Finding as Finding
from funcbp.check.report import Report as Report
