"""What holds for all tests."""

import os

from crosspool.build.start import TORCH_SETTINGS

# As the door to the engine does, before any test module imports torch: on shared cores, spinning OpenMP
# threads make a test of seconds take minutes.
for _name, _value in TORCH_SETTINGS.items():
    os.environ.setdefault(_name, _value)

# Kernels for GPUs are interpreted, on the CPU. Triton reads this when it is first imported, whoever does so.
# With 0, on a machine with a GPU, the same tests run there, compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")
