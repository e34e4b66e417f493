"""What holds for all tests."""

import os

from crosspool.build.start import TORCH_SETTINGS

# As the door to the engine does, before any test module imports torch: on shared cores, spinning OpenMP
# threads make a test of seconds take minutes.
for _name, _value in TORCH_SETTINGS.items():
    os.environ.setdefault(_name, _value)
