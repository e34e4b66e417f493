"""One run on one GPU: are kernels right, and their times beside the card's limits (scripts/gpu_check.py).

``run`` gives every section a process of its own and a share of the time, so that what crashes or hangs takes
nothing else with it. A section is a module with ``cases(gpu)``. ``device`` is the GPU, or what stands for it
where kernels are interpreted.
"""
