"""What a machine without a GPU can say of GPUs."""

from __future__ import annotations

import sys

import pytest

from crosspool.backends.cuda import _exchanges
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.backend


def test_without_bindings_nobody_knows_what_lies_between_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ConfigError, match=r"between cuda:0 and cuda:1 .* install crosspool\[cuda\]"):
        _exchanges(0, 1)
