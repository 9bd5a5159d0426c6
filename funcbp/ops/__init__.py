"""Functions with hand-written reverse rules, one op a file."""

from funcbp.ops.avg_pool import avg_pool as avg_pool
from funcbp.ops.conv import conv as conv
from funcbp.ops.dense import dense as dense
from funcbp.ops.depthwise_conv import depthwise_conv as depthwise_conv
from funcbp.ops.dropout import dropout as dropout
from funcbp.ops.elementwise_losses import hinge_loss as hinge_loss
from funcbp.ops.elementwise_losses import huber_loss as huber_loss
from funcbp.ops.elementwise_losses import log_cosh as log_cosh
from funcbp.ops.elementwise_losses import (
    sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy,
)
from funcbp.ops.elementwise_losses import squared_error as squared_error
from funcbp.ops.gated import geglu as geglu
from funcbp.ops.gated import glu as glu
from funcbp.ops.gated import swiglu as swiglu
from funcbp.ops.global_avg_pool import global_avg_pool as global_avg_pool
from funcbp.ops.global_max_pool import global_max_pool as global_max_pool
from funcbp.ops.layer_norm import layer_norm as layer_norm
from funcbp.ops.linear import linear as linear
from funcbp.ops.log_softmax import log_softmax as log_softmax
from funcbp.ops.max_pool import max_pool as max_pool
from funcbp.ops.piecewise import celu as celu
from funcbp.ops.piecewise import elu as elu
from funcbp.ops.piecewise import hard_sigmoid as hard_sigmoid
from funcbp.ops.piecewise import hard_silu as hard_silu
from funcbp.ops.piecewise import hard_tanh as hard_tanh
from funcbp.ops.piecewise import leaky_relu as leaky_relu
from funcbp.ops.piecewise import relu6 as relu6
from funcbp.ops.piecewise import selu as selu
from funcbp.ops.pointwise import gelu as gelu
from funcbp.ops.pointwise import relu as relu
from funcbp.ops.pointwise import sigmoid as sigmoid
from funcbp.ops.pointwise import silu as silu
from funcbp.ops.pointwise import tanh as tanh
from funcbp.ops.prelu import prelu as prelu
from funcbp.ops.rms_norm import rms_norm as rms_norm
from funcbp.ops.shaping import reverse_gradient as reverse_gradient
from funcbp.ops.shaping import scale_gradient as scale_gradient
from funcbp.ops.shaping import stop_gradient as stop_gradient
from funcbp.ops.shaping import straight_through_round as straight_through_round
from funcbp.ops.shaping import straight_through_sign as straight_through_sign
from funcbp.ops.softmax import softmax as softmax
from funcbp.ops.softmax_cross_entropy_with_integer_labels import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from funcbp.ops.softplus import log1mexp as log1mexp
from funcbp.ops.softplus import log_sigmoid as log_sigmoid
from funcbp.ops.softplus import mish as mish
from funcbp.ops.softplus import soft_sign as soft_sign
from funcbp.ops.softplus import softplus as softplus
from funcbp.ops.softplus import squareplus as squareplus
from funcbp.ops.weight_norm import weight_norm as weight_norm
