"""Speed and memory of the rules, as ratios measured in turn in one run."""

from funcbp.bench.overhead import Overhead as Overhead
from funcbp.bench.overhead import overhead as overhead
