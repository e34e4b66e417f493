"""Fields of a config.json: types, ranges, aliases and defaults, and what is said about wrong ones."""

from pathlib import Path
from typing import Any

import pytest

from crosspool.core.errors import CorruptCheckpointError
from crosspool.models.public_config import MAX_COUNT, MAX_JSON_BYTES, PublicConfig, read_json

pytestmark = pytest.mark.unit

FILE = Path("folder/config.json")


def config(**values: Any) -> PublicConfig:
    return PublicConfig(FILE, values, {"width": 7, "bias": False, "eps": 1e-6, "name": "silu"})


def test_what_is_left_out_has_its_default() -> None:
    empty = config()
    assert empty.size("width") == 7
    assert empty.flag("bias") is False
    assert empty.number("eps") == 1e-6
    assert empty.text("name") == "silu"
    assert empty.optional_size("unheard_of") is None


def test_what_is_given_goes_before_the_default_and_null_is_given() -> None:
    given = config(width=9, eps=1)
    assert given.size("width") == 9
    assert given.number("eps") == 1.0
    assert config(width=None).optional_size("width") is None


def test_the_first_alias_that_is_present_counts() -> None:
    assert config(other=3).size("width", "other") == 3
    assert config(width=5, other=3).size("width", "other") == 5
    assert config().size("width", "other") == 7


@pytest.mark.parametrize("value", [None, 0, -1, True, 2.0, "8", [8], 2**31])
def test_a_wrong_size_is_named_with_file_field_and_value(value: object) -> None:
    with pytest.raises(CorruptCheckpointError) as error:
        config(width=value).size("width")
    assert str(FILE) in str(error.value)
    assert "width" in str(error.value)
    assert repr(value) in str(error.value)


def test_ranges() -> None:
    assert config(width=0).size("width", low=0) == 0
    assert config(width=MAX_COUNT).count("width") == MAX_COUNT
    with pytest.raises(CorruptCheckpointError):
        config(width=MAX_COUNT + 1).count("width")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_a_wrong_number(value: object) -> None:
    with pytest.raises(CorruptCheckpointError, match="eps must be a number above 0"):
        config(eps=value).number("eps")


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_wrong_flag(value: object) -> None:
    with pytest.raises(CorruptCheckpointError, match="bias must be true or false"):
        config(bias=value).flag("bias")


def test_a_wrong_text() -> None:
    with pytest.raises(CorruptCheckpointError, match="name must be text, not 3"):
        config(name=3).text("name")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "must hold a JSON object, not list"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message) as error:
        read_json(file)
    assert str(file) in str(error.value)


def test_a_file_that_is_missing_or_far_too_large(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(CorruptCheckpointError, match="cannot be read: No such file"):
        read_json(file)
    with file.open("wb") as opened:
        opened.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CorruptCheckpointError, match=f"{MAX_JSON_BYTES + 1:,} bytes"):
        read_json(file)


def test_a_json_object(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": [1, null]}', encoding="utf-8")
    assert read_json(file) == {"a": [1, None]}
