"""Attention of public models, for which kernels are compiled in tests."""

from __future__ import annotations

from crosspool.kernels.triton.attend import AttentionShape

QWEN3_30B_A3B = AttentionShape(32, 4, 128, 0, 128**-0.5)
DEEPSEEK_V2_LITE = AttentionShape(16, 1, 512, 64, 192**-0.5)
