"""Jit-compiled training steps as pure functions, and the loop around them."""

from funcbp.train.fit import History as History
from funcbp.train.fit import evaluate as evaluate
from funcbp.train.fit import fit as fit
from funcbp.train.step import TrainState as TrainState
from funcbp.train.step import init_state as init_state
from funcbp.train.step import make_step as make_step
from funcbp.train.step import supervised as supervised
