"""What `cache verify`, `pack` and `unpack` do with folders of disk tiers."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from hybrid_cache.sizes import format_bytes
from hybrid_cache.storage import packs


def verify_folder(folder: Path, *, drop: bool, as_json: bool) -> int:
    """-> the status to leave with."""
    found = packs.verify(folder, drop=drop)
    num_bad = sum(found.bad.values())
    lines = [f"{found.num_entries - num_bad:,} entries are what they were, {format_bytes(found.num_bytes)}"]
    lines += [f"{count:,} are not: {why}" for why, count in sorted(found.bad.items())]
    lines += [f"{found.dropped:,} dropped, with those that needed them"] if drop else []
    _say(lines, asdict(found), as_json=as_json)
    return int(num_bad > 0)


def pack_prefix(folder: Path, name: str, target: Path, *, as_json: bool) -> None:
    facts = packs.pack(folder, name, target)
    last, size = facts[-1], target.stat().st_size
    about = {"name": last.name.hex(), "tokens": last.num_tokens, "entries": len(facts), "bytes": size}
    _say(
        [f"{target}: {last.num_tokens:,} tokens in {len(facts)} entries, {format_bytes(size)}"], about, as_json=as_json
    )


def unpack_prefix(source: Path, folder: Path, budget_bytes: int, *, as_json: bool) -> None:
    facts, num_new = packs.unpack(source, folder, budget_bytes)
    last = facts[-1]
    about = {"name": last.name.hex(), "tokens": last.num_tokens, "entries": len(facts), "new": num_new}
    _say([f"{folder}: {last.num_tokens:,} tokens in {len(facts)} entries, {num_new} new"], about, as_json=as_json)


def _say(lines: list[str], about: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(about, indent=2))
    else:
        Console(soft_wrap=True, highlight=False).print("\n".join(lines), markup=False)
