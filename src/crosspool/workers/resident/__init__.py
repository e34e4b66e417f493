"""Resident teams: micro-batches run layer by layer and token by token in compiled code."""
