"""What users import, listed; and what importing costs."""

import subprocess
import sys

import pytest

import crosspool

pytestmark = pytest.mark.unit

PUBLIC = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "CorruptCheckpointError",
    "CrossPoolError",
    "DeviceError",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "InvalidRequestError",
    "InvariantError",
    "MissingTensorError",
    "ModelConfig",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelUnavailableError",
    "OutOfMemoryError",
    "OutputLogprobs",
    "OverloadedError",
    "PoolConfig",
    "RequestError",
    "RequestOutput",
    "RequestTooLargeError",
    "SamplingParams",
    "SchedulerConfig",
    "TensorShapeError",
    "TextDelta",
    "TokenChance",
    "UnsupportedModelError",
    "__version__",
]


def loaded_after(statement, *modules):
    """Which of the modules are loaded in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*[m for m in {modules!r} if m in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_the_public_names():
    assert crosspool.__all__ == PUBLIC
    assert dir(crosspool) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_there(name):
    value = getattr(crosspool, name)
    if isinstance(value, type):
        assert value.__name__ == name
        assert value.__doc__


def test_every_error_of_the_tree_is_public():
    from crosspool.core import errors

    tree = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert tree <= set(PUBLIC)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="'crosspool' has no attribute 'Nothing'"):
        _ = crosspool.Nothing


def test_core_loads_nothing_above_it():
    heavy = ("crosspool.llm", "crosspool.text", "tokenizers", "transformers", "torch", "jinja2", "numpy")
    assert loaded_after("import crosspool.core.spec", *heavy) == []
    assert loaded_after("from crosspool import SamplingParams, ModelLoadError, EngineConfig", *heavy) == []


def test_the_api_process_loads_no_torch():
    statement = "import crosspool.llm; from crosspool import AsyncLLM, LLM; import crosspool.text.front"
    assert loaded_after(statement, "torch", "transformers", "crosspool.build.runtime") == []
