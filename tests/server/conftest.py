from __future__ import annotations

import sys
from pathlib import Path

import pytest

import helpers_fake_engine
from crosspool.core.config import EngineConfig, ModelConfig
from helpers_tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer and nothing else, which is all that a fake engine needs."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def fake_config(tokenizer_folder: Path) -> EngineConfig:
    """Two models that serve and one that does not load."""
    return EngineConfig(
        models=(
            ModelConfig("tiny", str(tokenizer_folder)),
            ModelConfig("other", str(tokenizer_folder)),
            ModelConfig("broken", str(tokenizer_folder.parent / helpers_fake_engine.BROKEN_FOLDER)),
        )
    )


@pytest.fixture(scope="session")
def fake_cell_command() -> tuple[str, ...]:
    return (sys.executable, str(Path(helpers_fake_engine.__file__)))
