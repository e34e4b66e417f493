"""Kernels for GPUs. They find models and weights through tables of addresses, so that one compiled graph
serves every model of a geometry."""
