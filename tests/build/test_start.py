"""What torch's libraries are told before they are loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from crosspool.build.start import TORCH_SETTINGS

pytestmark = pytest.mark.integration

SCRIPT = """
import json, os, sys
os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
import crosspool.build.start as start
assert "torch" not in sys.modules
start._prepare_torch()
import torch
print(json.dumps({name: os.environ.get(name) for name in start.TORCH_SETTINGS}))
"""


def test_torch_is_told_before_it_is_imported_and_the_environment_goes_first() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {**TORCH_SETTINGS, "OMP_WAIT_POLICY": "ACTIVE"}
