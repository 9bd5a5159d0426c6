"""Functions with hand-written reverse rules, one op a file."""

from funcbp.ops.avg_pool import avg_pool as avg_pool
from funcbp.ops.conv import conv as conv
from funcbp.ops.dense import dense as dense
from funcbp.ops.depthwise_conv import depthwise_conv as depthwise_conv
from funcbp.ops.dropout import dropout as dropout
from funcbp.ops.global_avg_pool import global_avg_pool as global_avg_pool
from funcbp.ops.global_max_pool import global_max_pool as global_max_pool
from funcbp.ops.layer_norm import layer_norm as layer_norm
from funcbp.ops.linear import linear as linear
from funcbp.ops.log_softmax import log_softmax as log_softmax
from funcbp.ops.max_pool import max_pool as max_pool
from funcbp.ops.pointwise import gelu as gelu
from funcbp.ops.pointwise import relu as relu
from funcbp.ops.pointwise import sigmoid as sigmoid
from funcbp.ops.pointwise import silu as silu
from funcbp.ops.pointwise import tanh as tanh
from funcbp.ops.rms_norm import rms_norm as rms_norm
from funcbp.ops.softmax import softmax as softmax
from funcbp.ops.softmax_cross_entropy_with_integer_labels import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from funcbp.ops.weight_norm import weight_norm as weight_norm
