"""Compiled CPU kernels (Numba).

They take addresses and descriptors instead of tensors, for they are called by other compiled code, by every
thread of a team together (team.py), and never by Python between two layers. A descriptor is an int64 array of
fields; each module names its own fields and has the function that makes one from tensors. Whoever makes a
descriptor keeps the tensors alive.
"""
