"""Sizes in bytes and large counts, as people write and read them."""

import re

from hybrid_cache.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("i", 1024), ("", 1024))
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})")
MAX_BYTES = 2**50


def parse_bytes(text: str) -> int:
    """`2GiB`, `512MiB`, `1.5GB`, `4G` (binary), or plain bytes -> bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConfigError(f"{text!r} is not a size; write for example 2GiB, 512MiB, 1.5GB or 1073741824")
    num_bytes = int(float(match[1]) * units[match[2].lower()]) if "." in match[1] else int(match[1]) * units[
        match[2].lower()
    ]
    if not 1 <= num_bytes <= MAX_BYTES:
        raise ConfigError(f"{text!r} is {num_bytes} bytes, must be in [1, {MAX_BYTES}]")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            break
        num_bytes /= 1024
    else:
        unit = "TiB"
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.3g} {unit}"


def format_count(count: float) -> str:
    """`2500000` -> `2.5 M`."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"
