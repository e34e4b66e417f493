"""The demo zoo: five small models made on this machine, without a model hub and without torch.

SmolLM2-135M-Instruct with its real weights, two Mixture-of-Experts models upcycled from it that give the same
answers, and two models of random weights in the architectures of Qwen3-MoE and DeepSeek-V2.
"""
