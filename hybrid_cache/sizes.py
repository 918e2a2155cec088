"""Sizes in bytes and large counts, as people write and read them."""

import re

from hybrid_cache.errors import ConfigError

MAX_BYTES = 2**50
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?\s*([a-z]{0,3})", re.IGNORECASE | re.ASCII)
_FACTORS: dict[str, int] = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000), ("i", 1024), ("", 1024))
}


def parse_bytes(text: str) -> int:
    """`2GiB`, `512MiB`, `1.5GB`, `4G` (binary, as in `4GiB`) or plain bytes -> bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[3].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{text!r} is not a size, wanted one such as 2GiB, 512MiB, 1.5GB or 1073741824")
    digits = match[2] or ""
    scale: int = 10 ** len(digits)
    num_bytes = int(match[1] + digits) * factor // scale
    if not 1 <= num_bytes <= MAX_BYTES:
        raise ConfigError(f"{text!r} is {num_bytes} bytes, must be in [1, {MAX_BYTES}]")
    return num_bytes


def parse_budget(text: str) -> int | None:
    """A size, or `auto` -> None. Raises ConfigError."""
    return None if text.strip().lower() == "auto" else parse_bytes(text)


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{_three_digits(num_bytes)} {unit}"
        num_bytes /= 1024
    return f"{_three_digits(num_bytes)} TiB"


def format_count(count: float) -> str:
    """`2500000` -> `2.5 M`."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{_three_digits(count)}{unit}"
        count /= 1000
    return f"{_three_digits(count)} T"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
