"""Base layers: a linear map with a dense or a 4-bit weight behind one interface.

forward(x)                                     x (..., k) -> (..., n)
forward_low_rank(x, A, B, scale, z, dropout, seed, with_bias)   forward(x) + scale * dropout(z or x) A^T B^T
forward_low_rank_rows(x, A, B, scale, index, z)                 forward(x), and the branch index[i] for row i of the batch
product(x)                                     x W^T, without the bias
dense_weight(), set_dense_weight(w)            W (n, k) as floats, out and in
rounded(w)                                     w as set_dense_weight would store it, in floats; nothing is stored
weight_snapshot(), restore_weight(snapshot)    the stored bytes themselves, so that a merge can be undone exactly
"""

from peftk.nn.base import base_layer, is_adaptable
from peftk.nn.dense_linear import DenseConv1D, DenseLinear
from peftk.nn.experts import Experts, is_experts
from peftk.nn.int8_activations import use_int8_activations
from peftk.nn.nf4_linear import NF4Linear
from peftk.nn.quantize_model import quantizable, quantize_model
from peftk.nn.sharding import constants_as_parameters

__all__ = [
    "DenseConv1D",
    "DenseLinear",
    "Experts",
    "NF4Linear",
    "base_layer",
    "constants_as_parameters",
    "is_adaptable",
    "is_experts",
    "quantizable",
    "quantize_model",
    "use_int8_activations",
]
