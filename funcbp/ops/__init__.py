"""Functions with hand-written reverse rules, one op a file."""

from funcbp.ops.avg_pool import avg_pool as avg_pool
from funcbp.ops.batch_norm import batch_norm as batch_norm
from funcbp.ops.batch_norm import batch_norm_inference as batch_norm_inference
from funcbp.ops.bilinear import bilinear as bilinear
from funcbp.ops.conv import conv as conv
from funcbp.ops.conv_transpose import conv_transpose as conv_transpose
from funcbp.ops.cosine_distance import cosine_distance as cosine_distance
from funcbp.ops.cross_entropy import cross_entropy as cross_entropy
from funcbp.ops.dense import dense as dense
from funcbp.ops.depthwise_conv import depthwise_conv as depthwise_conv
from funcbp.ops.dropout import dropout as dropout
from funcbp.ops.einsum import einsum as einsum
from funcbp.ops.elementwise_losses import hinge_loss as hinge_loss
from funcbp.ops.elementwise_losses import huber_loss as huber_loss
from funcbp.ops.elementwise_losses import log_cosh as log_cosh
from funcbp.ops.elementwise_losses import (
    sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy,
)
from funcbp.ops.elementwise_losses import sigmoid_focal_loss as sigmoid_focal_loss
from funcbp.ops.elementwise_losses import squared_error as squared_error
from funcbp.ops.embedding import embedding as embedding
from funcbp.ops.embedding import unembedding as unembedding
from funcbp.ops.gated import geglu as geglu
from funcbp.ops.gated import glu as glu
from funcbp.ops.gated import swiglu as swiglu
from funcbp.ops.global_avg_pool import global_avg_pool as global_avg_pool
from funcbp.ops.global_max_pool import global_max_pool as global_max_pool
from funcbp.ops.group_norm import group_norm as group_norm
from funcbp.ops.info_nce import info_nce as info_nce
from funcbp.ops.instance_norm import instance_norm as instance_norm
from funcbp.ops.kl_divergence import kl_divergence as kl_divergence
from funcbp.ops.layer_norm import layer_norm as layer_norm
from funcbp.ops.linear import linear as linear
from funcbp.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from funcbp.ops.log_softmax import log_softmax as log_softmax
from funcbp.ops.logcumsumexp import logcumsumexp as logcumsumexp
from funcbp.ops.logsumexp import logsumexp as logsumexp
from funcbp.ops.lora_linear import lora_linear as lora_linear
from funcbp.ops.max_pool import max_pool as max_pool
from funcbp.ops.norm import l2_normalize as l2_normalize
from funcbp.ops.norm import norm as norm
from funcbp.ops.norm import sqrt as sqrt
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
from funcbp.ops.poly_loss_cross_entropy import poly_loss_cross_entropy as poly_loss_cross_entropy
from funcbp.ops.prelu import prelu as prelu
from funcbp.ops.ragged_dot import ragged_dot as ragged_dot
from funcbp.ops.resize import resize as resize
from funcbp.ops.rms_norm import rms_norm as rms_norm
from funcbp.ops.shaping import clip_gradient as clip_gradient
from funcbp.ops.shaping import reverse_gradient as reverse_gradient
from funcbp.ops.shaping import scale_gradient as scale_gradient
from funcbp.ops.shaping import stop_gradient as stop_gradient
from funcbp.ops.shaping import straight_through_round as straight_through_round
from funcbp.ops.shaping import straight_through_sign as straight_through_sign
from funcbp.ops.softmax import softmax as softmax
from funcbp.ops.softmax_cross_entropy import softmax_cross_entropy as softmax_cross_entropy
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
