"""Speed, memory and digits of the rules, as ratios measured in turn in one run."""

from funcbp.bench.measure import Row as Row
from funcbp.bench.overhead import Overhead as Overhead
from funcbp.bench.overhead import overhead as overhead
from funcbp.bench.results import Machine as Machine
from funcbp.bench.results import Results as Results
from funcbp.bench.run import run as run
