"""What holds for all tests."""

import os

# As the doors to the engine do (build/start.py), before any test module imports torch: on shared cores,
# spinning OpenMP threads make a test of seconds take minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
