"""Sizes as people write and read them."""

import pytest

from hybrid_cache.errors import ConfigError
from hybrid_cache.sizes import MAX_BYTES, format_bytes, format_count, parse_bytes

GOOD = [
    ("2GiB", 2 << 30),
    ("512MiB", 512 << 20),
    ("1.5GB", 1_500_000_000),
    ("0.5KiB", 512),
    ("4G", 4 << 30),
    ("4Gi", 4 << 30),
    ("4 gib", 4 << 30),
    (" 3k ", 3072),
    ("1000", 1000),
    ("7B", 7),
    ("1TiB", 1 << 40),
]
BAD = [
    "",
    "GiB",
    "-1GiB",
    "0",
    "0.1B",
    "1..5G",
    "1e9",
    "2 GiB each",
    "2Gib!",
    "2XB",
    "2PiB",
    "1" * 30,
    "\u0663",
    "0x10",
]


@pytest.mark.parametrize(("text", "num_bytes"), GOOD)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", [*BAD, f"{MAX_BYTES + 1}"])
def test_what_is_no_size_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (339200, "331 KiB"),
        (2 << 30, "2 GiB"),
        (3 << 40, "3 TiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_bytes_are_written_with_three_digits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (999, "999"), (1932348, "1.93 M"), (2e9, "2 G"), (5e13, "50 T")])
def test_counts_are_written_with_three_digits(count: float, text: str) -> None:
    assert format_count(count) == text
