"""Where a model named on the command line or in a zoo file is: a folder here, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from crosspool.core.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "vocab.txt", "chat_template*"]
"""What is taken from the hub: weights as safetensors, configs, tokenizers. Never pickles, never code."""


def find_checkpoint(place: str, base: Path) -> tuple[str, Path]:
    """The default name and the folder of a checkpoint.

    A folder, relative to ``base``, comes first and is named as its last part. Otherwise
    ``organisation/model`` is fetched from the hub and keeps that name. Raises ConfigError if it is neither,
    or cannot be fetched.
    """
    folder = base / Path(place).expanduser()
    if place and folder.is_dir():
        return folder.resolve().name, folder.resolve()
    if folder.is_file():
        raise ConfigError(f"{place} is a file: give the folder that holds config.json and the safetensors")
    if HUB_ID.fullmatch(place):
        return place, _fetch(place)
    raise ConfigError(f"there is no folder {folder}, and {place!r} is no hub id (organisation/model)")


def _fetch(repository: str) -> Path:
    """The folder of a hub repository's files, downloaded if they are not in the hub's cache yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(repository, allow_patterns=HUB_PATTERNS, ignore_patterns=["*.py", "*/*"])
        )
    except GatedRepoError:
        reason = "its owner gives access on request only; ask on its page, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such repository, or it is private"
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and the files are not in its cache here"
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    raise ConfigError(f"there is no folder {repository}, and it cannot be fetched from the hub: {reason}")
