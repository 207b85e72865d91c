"""Sparse convolution and matrix product on GPUs: weights as the Triton kernels of `kernels/triton/` want them, and the launches.

    conv2d     y = clip(conv2d(x, W) + bias + residual)      on a `Weight`
    gradients  of x and of the kept values, for the same arguments

Formats are those of processors by name: "csr", single weights, and "bsr", blocks of BLOCKS x BLOCKS (outputs x channels of one tap).
Types: float32 (products in float32, or TF32 where torch allows it: `torch.backends.cuda.matmul.allow_tf32`), float16 and bfloat16, with
float32 sums; float64 for checks. Tensors may have any strides: channels_last is fast for bsr, planes for csr. The order of additions
does not depend on which program runs first: equal inputs give equal bits.

`torch_op` is the door: its operators come here with tensors on a GPU. With TRITON_INTERPRET=1 in the environment Triton interprets the
kernels, and the functions take tensors in main memory: slow, for tests.
"""

from ticketkit.runtime.gpu.launch import BLOCKS, TYPES, Window, conv2d, gradients, interpreted, require
from ticketkit.runtime.gpu.weight import Weight, fill

__all__ = ["BLOCKS", "TYPES", "Weight", "Window", "conv2d", "fill", "gradients", "interpreted", "require"]
