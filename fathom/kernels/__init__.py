"""Operations that have a fast path (report §3.3), each beside the slow reference it must equal.

This is the one place that is imported from; which implementation runs is decided inside, by device
and dtype.
"""

from fathom.kernels.attention import absorbed_attention, expanded_attention
from fathom.kernels.cross_entropy import IGNORE, linear_cross_entropy
from fathom.kernels.expansion import Expansion, HeadShape
from fathom.kernels.fuse import compile_elementwise
from fathom.kernels.grouped import grouped_linear
from fathom.kernels.linear import linear
from fathom.kernels.norm import rms_norm
from fathom.kernels.permute import gather_rows, scatter_rows
from fathom.kernels.recompute import remember
from fathom.kernels.rotary import Rotation, rotate
from fathom.kernels.swiglu import swiglu, swiglu_pair
from fathom.kernels.visible import ALL, Visible
from fathom.kernels.wide import at_least_float32, wide_dtype

__all__ = [
    "ALL",
    "IGNORE",
    "Expansion",
    "HeadShape",
    "Rotation",
    "Visible",
    "absorbed_attention",
    "at_least_float32",
    "compile_elementwise",
    "expanded_attention",
    "gather_rows",
    "grouped_linear",
    "linear",
    "linear_cross_entropy",
    "remember",
    "rms_norm",
    "rotate",
    "scatter_rows",
    "swiglu",
    "swiglu_pair",
    "wide_dtype",
]
