"""`hybrid-cache bench policy --from-server URL`: what else would have saved how much of a server's traffic.

The server says which requests it served of late and what it found of each in its cache, by hashes and without text.
They are replayed as any record is, see `server_replay`; and its own policy in its own budget shows how far to trust
that.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx

from hybrid_cache.api.server.recording.lines import FORMAT
from hybrid_cache.bench.common.http_client import ServerFailed, message_of
from hybrid_cache.bench.common.terminal import progress_bar
from hybrid_cache.bench.policy.cells import Setting, saved_by_server, simulation
from hybrid_cache.bench.policy.report import percent
from hybrid_cache.bench.policy.rows import BOUND, CLAIRVOYANT, LIMITS, PolicyRow, best_of, short
from hybrid_cache.bench.traces.files import load_trace
from hybrid_cache.bench.traces.records import TraceError
from hybrid_cache.bench.traces.trace import RecordedServer, Trace
from hybrid_cache.cache.policies.registry import canonical_name, make_policy
from hybrid_cache.errors import ConfigError
from hybrid_cache.sizes import format_bytes

PATH = "/cache/traffic"
TIMEOUT = httpx.Timeout(60.0, connect=5.0)


def check_alone(live: object, trace: object, workload: object, format: object) -> None:
    """Raises ConfigError where there is a trace beside what a server served."""
    if live or trace or workload or format:
        raise ConfigError("--from-server brings its own trace, leave out --live, --trace, --workload and --format")


def fetched(url: str, key_file: Path | None) -> Trace:
    """What a server served of late. Raises ServerFailed, or ConfigError where that is nothing."""
    key = key_file.read_text().strip() if key_file else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "traffic.jsonl"
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False) as http:
            download(http, file)
        try:
            trace = load_trace(file, "recorded")
        except TraceError as error:
            raise ConfigError(f"{url}: {str(error).partition('traffic.jsonl')[2].lstrip(':') or error}") from error
    return replace(trace, name=httpx.URL(url).netloc.decode())


def download(http: httpx.Client, file: Path) -> None:
    """Raises ServerFailed."""
    try:
        with http.stream("GET", PATH) as response, file.open("wb") as out:
            if response.status_code != 200:
                raise refused(http, response)
            for data in watched(response.iter_bytes()):
                out.write(data)
    except httpx.ConnectError as error:
        raise ServerFailed(f"{http.base_url}: no connection, is the server running? ({error})") from error
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        raise ServerFailed(f"{http.base_url}: the connection broke or timed out ({reason})") from error
    with file.open("rb") as lines:
        if f'"{FORMAT}"'.encode() not in lines.readline():
            raise ServerFailed(f"{http.base_url}{PATH}: no record, is that another kind of server?")


def watched(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, with progress on the error stream if that is a terminal."""
    progress = progress_bar()
    if not progress.console.is_terminal:
        yield from pieces
        return
    with progress:
        task = progress.add_task("bytes from the server", total=None)
        for data in pieces:
            progress.update(task, advance=len(data))
            yield data


def refused(http: httpx.Client, response: httpx.Response) -> ServerFailed:
    response.read()
    try:
        body = response.json()
    except ValueError:
        body = {}
    error = body.get("error") if isinstance(body, dict) else None
    if response.status_code == 404 and not (isinstance(error, dict) and error.get("code") == "not_recorded"):
        return ServerFailed(f"{http.base_url}: it does not know {PATH}: not a server of ours, or not of this version")
    said = message_of(error) if error else f"HTTP {response.status_code}"
    return ServerFailed(f"{http.base_url}: {said}")


def told(setting: Setting, rows: Sequence[PolicyRow]) -> list[str]:
    """What a server saved, and what it would have saved, in sentences; none for a trace that no server recorded."""
    server = setting.trace.server
    if server is None:
        return []
    own = [row for row in rows if (row.trace, row.model) == (setting.trace.name, setting.model)]
    return [*really(setting, server), *otherwise(setting, server, own)]


def really(setting: Setting, server: RecordedServer) -> list[str]:
    requests = setting.trace.requests
    cached = sum(r.stay.cached_tokens for r in requests if r.stay)
    lines = [
        f"The server saved {percent(saved_by_server(setting))} of prefill FLOPs in these {len(requests):,} requests, "
        f"with {server.policy} in {format_bytes(server.budget_bytes)}: {cached:,} of "
        f"{setting.trace.num_prompt_tokens:,} prompt tokens were cached."
    ]
    if totals := server.totals:
        of = totals.get("prompt_tokens", 0)
        lines.append(f"Since its start it counts {totals.get('cached_tokens', 0):,.0f} of {of:,.0f} tokens.")
    if (again := replayed_tokens(setting, server)) is not None:
        off = abs(again - cached) / max(cached, 1)
        lines.append(f"Replayed as it ran, {again:,} are cached: the replay is off by {100 * off:.2f} %.")
    return lines


def replayed_tokens(setting: Setting, server: RecordedServer) -> int | None:
    """Cached tokens of a replay with the server's own policy and budget; None for a policy that is not here."""
    try:
        policy = make_policy(canonical_name(server.policy), setting.spec, setting.cost, server.budget_bytes)
    except ConfigError:
        return None
    return int(simulation(setting, server.budget_bytes, policy).run().hit_tokens.sum())


def otherwise(setting: Setting, server: RecordedServer, rows: Sequence[PolicyRow]) -> list[str]:
    """A sentence for each size."""
    real, lines = saved_by_server(setting), list[str]()
    for size in sorted({row.capacity_bytes for row in rows}):
        here = {row.policy: row.flops_saved for row in rows if row.capacity_bytes == size}
        policies = {name: share for name, share in here.items() if name not in (*LIMITS, *CLAIRVOYANT)}
        best, parts = best_of(policies), list[str]()
        own = canonical_name(server.policy) if server.policy in policies else ""
        if own:
            parts.append(f"{short(own)} would have saved {compared(policies[own], real)}")
        if best and own not in best:
            tied = " and ".join(map(short, best))
            parts.append(f"{tied} {compared(policies[best[0]], real)}, the most of all")
        elif best and len(policies) > 1:
            parts.append("the most of all" if len(best) == 1 else "as much as any other")
        if BOUND in here:
            parts.append(f"more than {percent(here[BOUND])} is not possible")
        if parts:
            times = size / server.budget_bytes
            lines.append(f"In {format_bytes(size)} ({times:.3g}x the budget) {'; '.join(parts)}.")
    return lines


def compared(share: float, real: float) -> str:
    """`40.0 %, 2.1 points more than the server did`"""
    points = 100 * (share - real)
    if abs(points) < 0.05:
        return f"{percent(share)}, as the server did"
    return f"{percent(share)}, {abs(points):.1f} points {'more' if points > 0 else 'less'} than the server did"
