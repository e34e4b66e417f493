from __future__ import annotations

import pytest

from crosspool.cli.sizes import format_bytes, parse_bytes
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("17B", 17),
        ("2GiB", 2 * 2**30),
        ("2 gib", 2 * 2**30),
        ("500MB", 500_000_000),
        ("500mb", 500_000_000),
        ("3kB", 3000),
        ("1.5KiB", 1536),
        ("0.25 TB", 250_000_000_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2G", "2XB", "1e9", "1,000", "two", "1.GiB", "2GiB!", "٢"])
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of bytes: write for instance 2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 2**20, "1.50 GiB"),
        (23 * 2**30, "23.0 GiB"),
        (500 * 2**20, "500 MiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes_are_written_with_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text
