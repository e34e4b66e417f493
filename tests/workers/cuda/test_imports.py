"""What runs on a machine that has torch, Triton, numpy and safetensors, and nothing of a server."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.backend

NOT_NEEDED = [
    "fastapi",
    "gguf",
    "h11",
    "httptools",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "llvmlite",
    "msgspec",
    "numba",
    "prometheus_client",
    "psutil",
    "pyarrow",
    "pydantic",
    "rich",
    "scipy",
    "starlette",
    "tokenizers",
    "transformers",
    "typer",
    "uvicorn",
    "uvloop",
]

PROGRAM = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)

sys.meta_path.insert(0, Refuse())
import crosspool.backends.cuda, crosspool.kernels.reference, crosspool.kernels.triton
import crosspool.models, crosspool.workers.clock, crosspool.workers.cuda
for package in (crosspool.kernels.triton, crosspool.models, crosspool.workers.cuda):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name != "crosspool.models.placement":  # where compiled kernels for CPUs find weights
            importlib.import_module(module.name)
import crosspool.build.cuda, crosspool.build.runtime
"""


def test_devices_need_nothing_of_a_server() -> None:
    program = PROGRAM.format(refused=set(NOT_NEEDED))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
