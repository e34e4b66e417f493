"""What CrossPool does on a GPU, in ten minutes: is every kernel right, and how near are all to what the card
can do. Prints a table and writes one JSON.

    PYTHONPATH=src python scripts/gpu_check.py [--seconds 540] [--only ffn] [--json FILE]

It runs from a source tree and needs torch, triton, numpy and safetensors; without cuda-bindings nothing is
said of loops. Without a GPU it ends with status 2; there, --interpret runs its own code on the CPU with tiny
shapes, and no time that it then prints means anything. Triton keeps what it has compiled, so a second run
gets further in the same time. See benchmarks/gpu.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    from gpu.run import main as run

    return run(__doc__)


if __name__ == "__main__":
    sys.exit(main())
