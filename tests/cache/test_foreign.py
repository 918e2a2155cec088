"""Policies that are not part of the project: named by module and class, or offered by an installed package."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from hybrid_cache.cache.policies import foreign
from hybrid_cache.cache.policies.base import ScoredPolicy
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.registry import canonical_name, make_policy
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from tests.cache.driver import COST, SPECS, begin, fill, new_cache, tokens_of

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
HYBRID = SPECS["slot of four pages"]

SOURCE = """
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.base import ScoredPolicy, Wish
from hybrid_cache.cache.tree import CheckpointKind

class Fine(LRU):
    name = "fine"

class Fitted(LRU):
    def __init__(self, budget_bytes):
        super().__init__()
        self.budget_bytes = budget_bytes

    @classmethod
    def for_cache(cls, spec, cost, budget_bytes):
        return cls(budget_bytes)

class Half:
    def open(self, worth_of, clock): pass

class NoScore(ScoredPolicy):
    pass

class Angry(LRU):
    def __init__(self):
        raise ValueError("not today")

class Nan(LRU):
    def score(self, base, kind, worth):
        return float("nan")

class OffTheGrid(LRU):
    def propose(self, outline):
        return [Wish(65, CheckpointKind.INTERIOR)]

class BeyondTheEnd(LRU):
    def propose(self, outline):
        return [Wish(1 << 20, CheckpointKind.INTERIOR)]

class BeforeTheStart(LRU):
    def propose(self, outline):
        return [Wish(-64, CheckpointKind.INTERIOR)]

class Disordered(LRU):
    def propose(self, outline):
        for position, kind in ((192, "explicit"), (64, "branch"), (128, "interior"), (64, "interior")):
            yield Wish(position, CheckpointKind(kind))

class Leaving(LRU):
    def __init__(self):
        raise SystemExit("enough")

class Undecided(LRU):
    keeps_states = None

class Former:
    keeps_states = True
    wants_rises = False
    name = "former"

    def __init__(self):
        self.told = []

    def open(self, worth_of, clock): pass
    def propose(self, outline): return []
    def finished(self, name, num_output_tokens): self.told.append((name, num_output_tokens))
    def candidate(self, kind, name, worth): return None
    def used(self, kept, path): pass
    def add(self, kept): pass
    def remove(self, kept): pass
    def lowest(self): return None
    def lost(self, name, score, above): pass
    def items(self): return []
    def score_of(self, kept): return None

class FormerScored(LRU):
    def __init__(self):
        super().__init__()
        self.told = []

    def finished(self, name, num_output_tokens):
        self.told.append((name, num_output_tokens))

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "their_policies.py").write_text(SOURCE)
    (tmp_path / "broken_policies.py").write_text("1 / 0\n")
    (tmp_path / "leaving_policies.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_policies"
    sys.modules.pop("their_policies", None)


def test_a_class_by_module_and_name_is_a_policy_for_server_and_bench(module: str) -> None:
    name = f"{module}:Fine"
    assert EngineConfig(policy=name).policy == name
    policy = make_policy(name, HYBRID, COST, 1 << 20)
    assert isinstance(policy, LRU)
    assert policy.name == name


def test_a_class_that_depends_on_the_cache_is_told_of_it(module: str) -> None:
    assert vars(make_policy(f"{module}:Fitted", HYBRID, COST, 12345))["budget_bytes"] == 12345


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere.at_all:Fine", r"module 'nowhere.at_all' cannot be imported: ModuleNotFoundError: No module named"),
        ("broken_policies:Fine", r"cannot be imported: ZeroDivisionError: .*broken_policies.py:1\)"),
        ("their_policies:Fain", "module their_policies has no class 'Fain'"),
        ("their_policies:number", "module their_policies has no class 'number'"),
        (
            "their_policies:Half",
            "Half lacks propose, ended, candidate, used, add, remove, lowest, lost, items, score_of",
        ),
        ("their_policies:NoScore", "NoScore lacks score, clock"),
        ("their_policies:Angry", r"its constructor raised ValueError: not today \(.*their_policies.py:26\)"),
        ("their_policies:Leaving", r"its constructor raised SystemExit: enough"),
        ("leaving_policies:Fine", r"cannot be imported: SystemExit: 3 \(.*leaving_policies.py:2\)"),
        ("their_policies:Undecided", "keeps_states must be True or False"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(module: str, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        make_policy(name, HYBRID, COST, 1 << 20)
    assert str(caught.value).startswith(f"policy {name!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Nan", "the score of a state is nan"),
        ("OffTheGrid", "a state at 65, must be at a multiple of 64 up to 65"),
        ("BeyondTheEnd", "a state at 1048576, must be at a multiple of 64 up to 65"),
        ("BeforeTheStart", "a state at -64, must be at a multiple of 64 up to 65"),
    ],
)
def test_a_policy_that_lies_is_named_before_the_cache_believes_it(module: str, name: str, problem: str) -> None:
    cache = new_cache(HYBRID, slots=4, pages=10, policy=make_policy(f"{module}:{name}", HYBRID, COST, 1 << 20))

    def use() -> None:
        for prompt in ("a", "b", "c", "d", "e"):
            fill(cache, tokens_of(prompt), TILE)
            cache.propose(begin(cache, tokens_of(prompt, 1)).lease)

    with pytest.raises(ConfigError, match=f"policy 'their_policies:{name}': {problem}"):
        use()


def test_states_may_be_proposed_in_any_order_and_count_once(module: str) -> None:
    policy = make_policy(f"{module}:Disordered", HYBRID, COST, 1 << 20)
    cache = new_cache(HYBRID, slots=4, pages=10, policy=policy)
    wishes = cache.propose(begin(cache, tokens_of("abc", 1)).lease)
    assert [(wish.position, wish.kind.value) for wish in wishes] == [
        (64, "branch"),
        (128, "interior"),
        (192, "explicit"),
    ]


def test_an_installed_package_offers_a_policy_by_a_short_name(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", f"{module}:Fine", foreign.GROUP)
    monkeypatch.setattr(foreign, "offered", lambda: {"theirs": point})
    assert canonical_name("theirs") == "theirs"
    assert make_policy("theirs", HYBRID, COST, 1 << 20).name == "theirs"
    with pytest.raises(ConfigError, match=r"unknown policy 'their', must be one of learned,.* theirs, or package"):
        canonical_name("their")


def test_all_that_the_protocol_asks_is_looked_for() -> None:
    assert {"open", "propose", "candidate", "used", "lowest", "items"} <= set(foreign.METHODS)
    assert foreign.lacking(LRU) == []
    assert foreign.lacking(ScoredPolicy) == ["score", "clock"]


def test_the_example_protects_what_was_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    cache = new_cache(HYBRID, slots=4, pages=10, policy=make_policy("probation:Probation", HYBRID, COST, 1 << 20))
    fill(cache, tokens_of("a"), TILE)
    cache.release(begin(cache, tokens_of("a", 1)).lease)
    for prompt in ("b", "c", "d", "e"):
        fill(cache, tokens_of(prompt), TILE)
    cache.check()
    assert cache.match("", tokens_of("a", 1)).length > 0 == cache.match("", tokens_of("b", 1)).length


def test_a_policy_that_knows_only_former_methods_is_still_told_of_endings(module: str) -> None:
    for name in ("Former", "FormerScored"):
        policy = make_policy(f"{module}:{name}", HYBRID, COST, 1 << 20)
        cache = new_cache(HYBRID, slots=4, pages=10, policy=policy)
        run = begin(cache, tokens_of("a", 1))
        ending = cache.release(run.lease, 7, Finish.STOP)
        assert ending is not None
        cache.tell(replace(ending, finish=Finish.TOOL_CALL, again=True))
        assert vars(policy)["told"] == [(run.lease.keys.names[-1], 7)], "once for each request"
