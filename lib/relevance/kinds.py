"""Torch functions by name: what relevance does at each."""

from collections.abc import Callable
from typing import Any

import torch

# Relevance splits in proportion to the terms of a sum or goes where the value came from: both are
# what the ordinary gradient does. So is the first-order rule of softmax (Achtibat et al. 2024).
_GRADIENT = """add radd sub rsub subtract neg negative sum mean cat concat concatenate stack
    hstack vstack dstack flatten unflatten reshape view view_as permute transpose t T mT
    swapaxes swapdims movedim moveaxis squeeze unsqueeze expand expand_as broadcast_to
    contiguous clone to float double half bfloat16 type type_as getitem chunk tensor_split split
    unbind select narrow index_select gather take_along_dim pad roll flip repeat
    repeat_interleave tile masked_fill where relu leaky_relu prelu threshold avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d
    max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin
    max min maximum minimum softmax interpolate upsample pixel_shuffle pixel_unshuffle
    channel_shuffle unfold fold tril triu diagonal reshape_as setitem copy zero cumsum topk sort
    median nanmedian kthvalue max_unpool1d max_unpool2d max_unpool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices grid_sample index_add
    index_fill index_copy index_put scatter scatter_add masked_scatter real imag view_as_real
    view_as_complex fft_fft fft_fft2 fft_fftn fft_ifft2 fft_rfft fft_rfft2 fft_irfft fft_irfft2
    fft_fftshift norm linalg_norm linalg_vector_norm std fmax fmin aminmax cummax cummin
    rot90 fliplr flipud ravel hsplit vsplit dsplit column_stack row_stack broadcast_tensors
    diag_embed diag slice_scatter select_scatter diagonal_scatter masked_select take diff nansum
    adjoint atleast_1d atleast_2d atleast_3d unsafe_chunk unsafe_split positive pos fft_ifftshift
    fft_irfftn"""
# ... and what eval mode leaves out
_DROPOUT = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
_ELEMENTWISE = """gelu silu mish elu selu celu tanh sigmoid special_expit hardswish hardsigmoid
    hardtanh relu6 softplus log_sigmoid softsign clamp clamp_min clamp_max clip hardshrink
    softshrink tanhshrink rrelu erf abs absolute sqrt square log1p expm1 atan sin sinh asinh tan
    local_response_norm"""
DROPOUT, ELEMENTWISE = frozenset(_DROPOUT.split()), frozenset(_ELEMENTWISE.split())
GRADIENT = frozenset(_GRADIENT.split()) | DROPOUT
ELEMENTWISE_PRODUCTS = {"mul", "rmul", "multiply"}
PRODUCTS = ELEMENTWISE_PRODUCTS | {
    "matmul", "rmatmul", "bmm", "mm", "mv", "dot", "vdot", "einsum", "tensordot", "inner", "outer",
    "ger", "kron",
}  # fmt: skip
QUOTIENTS = {"div", "divide", "truediv", "true_divide"}
RECIPROCALS = {"rsqrt", "reciprocal", "rdiv", "rtruediv"}
# A sum with a product: the product, and what multiplies it
FUSED: dict[str, tuple[Callable, str]] = {
    "addmm": (torch.mm, "alpha"), "baddbmm": (torch.bmm, "alpha"), "addmv": (torch.mv, "alpha"),
    "addcmul": (torch.mul, "value"), "addcdiv": (torch.div, "value"),
}  # fmt: skip
# Arguments that come next, where they are given by name
OPERANDS = (
    "condition", "input", "other", "exponent", "mat1", "mat", "batch1", "tensor1", "mat2",
    "batch2", "tensor2", "vec",
)  # fmt: skip
CONSTANTS = {
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like",
    "full_like", "empty_like",
}  # fmt: skip
# What tells how many rows there are by values rather than shapes, whatever it is given
COUNTING = {
    "masked_select",
    "nonzero",
    "argwhere",
    "unique",
    "unique_consecutive",
    "pack_padded_sequence",
}
UNSEEN = {"grad_fn", "requires_grad", "register_hook"}
NUMBERS = {"__float__", "__int__", "__complex__"}  # of one activation, that relevance cannot reach
CUT = {"relu6", "hardtanh"}  # on both sides
BOUNDS = {"clamp", "clamp_min", "clamp_max", "clip"}  # where these are activations: as in minimum
_LINEAR = """add radd sub rsub mul rmul div truediv multiply divide flatten unflatten reshape
    view view_as reshape_as permute transpose t T mT squeeze unsqueeze expand expand_as
    broadcast_to contiguous clone to float double half bfloat16 type type_as getitem select
    narrow repeat repeat_interleave tile interpolate upsample neg negative chunk split
    tensor_split unbind index_select gather movedim moveaxis swapaxes swapdims take_along_dim
    flip roll pad masked_fill where mean sum avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d tril triu diagonal unfold fold
    pixel_shuffle pixel_unshuffle channel_shuffle cumsum rot90 fliplr flipud ravel hsplit vsplit
    dsplit diag_embed diag masked_select take diff nansum adjoint atleast_1d atleast_2d atleast_3d
    unsafe_chunk unsafe_split positive pos broadcast_tensors"""
# What makes a gate of gates: functions linear in all that they read, elementwise functions of one
JOINS = {
    "add", "radd", "sub", "rsub", "subtract", "cat", "concat", "concatenate", "stack", "hstack",
    "vstack", "dstack", "column_stack", "row_stack", "slice_scatter", "select_scatter",
    "diagonal_scatter", "where", "setitem", "copy", "index_fill", "index_copy", "index_put",
    "index_add", "scatter", "scatter_add", "masked_scatter",
}  # fmt: skip
BENT = ELEMENTWISE | ELEMENTWISE_PRODUCTS | {
    "pow", "relu", "leaky_relu", "threshold", "prelu", "maximum", "minimum", "fmax", "fmin", "max",
    "min",
}  # fmt: skip
# ... and functions that select among activations, and among nothing else
_SELECTING = """max min amax amin aminmax maximum minimum fmax fmin topk sort median nanmedian
    kthvalue cummax cummin max_pool1d max_pool2d max_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
    adaptive_max_pool3d_with_indices"""
SELECTING = frozenset(_SELECTING.split())
FIRST = {"grid_sample"}  # of which relevance reaches the first argument alone
LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}  # which read but the shape of another
KEPT = frozenset(_LINEAR.split()) | DROPOUT  # a factor is one still after these
_GRID = "score the part that computes the grid separately, and detach the grid"
ADVICE = {
    "log_softmax": "let the model return logits",
    "detach": "score the model without detaching activations",
    "grid_sample": _GRID,
    "affine_grid": _GRID,
    "exp": "let torch's softmax, sigmoid or softplus compute what it is part of",
    "log": "let the model return logits, or torch's softplus compute what it is part of",
    "lstm": "score the layers around the recurrence separately",
    "gru": "score the layers around the recurrence separately",
}


def positional(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The arguments with those of ``OPERANDS``, which ``kwargs`` loses."""
    return (*args, *(kwargs.pop(name) for name in OPERANDS if name in kwargs))
