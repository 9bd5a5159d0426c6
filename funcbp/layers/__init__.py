"""Layers as pure `(init, apply)` pairs, and the combinators that compose them."""

from funcbp.layers.basic import dense as dense
from funcbp.layers.basic import dropout as dropout
from funcbp.layers.basic import flatten as flatten
from funcbp.layers.basic import gelu as gelu
from funcbp.layers.basic import layer_norm as layer_norm
from funcbp.layers.basic import log_softmax as log_softmax
from funcbp.layers.basic import relu as relu
from funcbp.layers.basic import sigmoid as sigmoid
from funcbp.layers.basic import silu as silu
from funcbp.layers.basic import softmax as softmax
from funcbp.layers.basic import tanh as tanh
from funcbp.layers.combine import concat as concat
from funcbp.layers.combine import parallel as parallel
from funcbp.layers.combine import residual as residual
from funcbp.layers.combine import serial as serial
from funcbp.layers.layer import Layer as Layer
from funcbp.layers.layer import lift as lift
from funcbp.layers.summary import Summary as Summary
from funcbp.layers.summary import summary as summary
