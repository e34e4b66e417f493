"""Plain torch: the oracle for every faster kernel, and what runs where there is none."""

from crosspool.kernels.reference.ffn import ACTIVATIONS, dense_ffn, moe_ffn
from crosspool.kernels.reference.gqa_attention import gqa_attention
from crosspool.kernels.reference.linear import linear
from crosspool.kernels.reference.mla_attention import mla_attention
from crosspool.kernels.reference.norm import rms_norm
from crosspool.kernels.reference.paged_context import write_pages
from crosspool.kernels.reference.rope import rope
from crosspool.kernels.reference.router import router

__all__ = [
    "ACTIVATIONS",
    "dense_ffn",
    "gqa_attention",
    "linear",
    "mla_attention",
    "moe_ffn",
    "rms_norm",
    "rope",
    "router",
    "write_pages",
]
