"""Makes sessions of turns, within limits, and counts what that took away."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from hybrid_cache.bench.agents.workload import AgentSession, Turn
from hybrid_cache.bench.traces.records import LARGEST
from hybrid_cache.errors import ConfigError

MAX_CALLS = 1_000_000
MAX_TOKENS = 2 * LARGEST
MAX_PAUSE_S = 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What sessions are cut to. Raises ConfigError."""

    max_calls: int = MAX_CALLS  # of a session
    max_tokens: int = MAX_TOKENS  # of a prompt and its answer
    max_pause_s: float = MAX_PAUSE_S

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("max_calls", self.max_calls, 1, MAX_CALLS),
            ("max_tokens", self.max_tokens, 2, MAX_TOKENS),
            ("max_pause_s", self.max_pause_s, 0, MAX_PAUSE_S),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{name} {value}: expected {least} to {most:g}")


class SessionMaker:
    """Collects sessions; `counts` says by what phrase how often something was not taken as it is."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sessions: list[AgentSession] = []
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, turns: Iterable[Turn], shared_tokens: int = 0) -> None:
        """A session up to the first turn beyond a limit; no turn behind that one is asked for."""
        kept, cut = list[Turn](), False
        for turn in turns:
            if cut := len(kept) == self.limits.max_calls or not self._fits(turn):
                break
            kept.append(turn)
        if not kept:
            self.counts["sessions without a call within the limits left out"] += 1
            return
        if cut:
            self.counts[f"sessions cut to {self._size_limits()}"] += 1
        elif kept[-1].tool:
            self.counts["sessions end in a call that nothing follows: its pause dropped, taken for no call"] += 1
        last = replace(kept.pop(), tool="", pause_s=None)
        self.sessions.append(AgentSession(kind, shared_tokens, (*map(self._capped, kept), last)))

    @property
    def notes(self) -> list[str]:
        return [f"{count:,} {phrase}" for phrase, count in self.counts.items() if count]

    def _fits(self, turn: Turn) -> bool:
        return turn.prompt_tokens + turn.output_tokens <= self.limits.max_tokens

    def _capped(self, turn: Turn) -> Turn:
        longest = self.limits.max_pause_s
        if turn.pause_s is None or turn.pause_s <= longest:
            return turn
        self.counts[f"pauses cut to {longest:g} s"] += 1
        return replace(turn, pause_s=longest)

    def _size_limits(self) -> str:
        calls, tokens = self.limits.max_calls, self.limits.max_tokens
        limits = [f"{calls:,} calls"] if calls < MAX_CALLS else []
        return " and ".join([*limits, f"{tokens:,} tokens"] if tokens < MAX_TOKENS else limits)
