"""Choosing tokens: each rule against a case that can be worked out by hand."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hybrid_cache.device.sampler import adjust, choose_tokens, log_probabilities
from hybrid_cache.errors import BadSampling
from hybrid_cache.kernels import dispatch
from hybrid_cache.sampling import Mask, SamplingParams, TokenChooser, mask_of

PROMPT = np.array([1, 2], np.int32)


def chooser(index: int = 0, **params: object) -> TokenChooser:
    return TokenChooser(SamplingParams(**{"max_tokens": 100, **params}), PROMPT, index)  # type: ignore[arg-type]


OPS = dispatch.select("torch")


class Only:
    """A constraint that always allows the same tokens, all below 8."""

    done = False

    def __init__(self, allowed: tuple[int, ...]) -> None:
        self._mask = mask_of(np.isin(np.arange(8), allowed))

    def mask(self) -> Mask:
        return self._mask

    def note(self, token: int) -> None: ...

    def ahead(self, most: int) -> Sequence[int]:
        return ()


def choose(one: TokenChooser, logits: torch.Tensor) -> int:
    (token,) = choose_tokens(logits[None], [one], OPS)
    one.note(token)
    return token


def drawn(probs: list[float], count: int = 2000, **params: object) -> Counter[int]:
    """How often each token is drawn from these probabilities."""
    logits = torch.tensor(probs).log()
    one = chooser(seed=7, **params)
    return Counter(choose(one, logits) for _ in range(count))


def test_zero_temperature_takes_the_largest_logit() -> None:
    assert choose(chooser(temperature=0), torch.tensor([0.0, 3.0, 1.0])) == 1


def test_draws_follow_the_probabilities() -> None:
    counts = drawn([0.1, 0.6, 0.3])
    for token, p in enumerate([0.1, 0.6, 0.3]):
        assert counts[token] / 2000 == pytest.approx(p, abs=0.04)


def test_temperature_sharpens() -> None:
    counts = drawn([0.2, 0.8], temperature=0.5)  # 0.04 to 0.64
    assert counts[0] / 2000 == pytest.approx(0.04 / 0.68, abs=0.02)


def test_top_k_keeps_the_k_largest() -> None:
    assert set(drawn([0.3, 0.1, 0.4, 0.2], top_k=2)) == {0, 2}


def test_top_p_keeps_the_token_that_reaches_the_sum() -> None:
    assert set(drawn([0.3, 0.1, 0.4, 0.2], top_p=0.6)) == {0, 2}
    assert set(drawn([0.3, 0.1, 0.4, 0.2], top_p=0.01)) == {2}


def test_min_p_is_relative_to_the_most_likely_token() -> None:
    assert set(drawn([0.3, 0.1, 0.4, 0.2], min_p=0.6)) == {0, 2}


def test_logit_bias_can_force_and_forbid() -> None:
    logits = torch.tensor([5.0, 0.0, 4.0])
    assert choose(chooser(temperature=0, logit_bias={1: 100.0}), logits) == 1
    assert choose(chooser(temperature=0, logit_bias={0: -100.0}), logits) == 2
    assert logits.tolist() == [5.0, 0.0, 4.0]  # the model's logits stay what they are


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    logits = torch.tensor([1.0, 1.5, 1.4])
    one = chooser(temperature=0, presence_penalty=0.2)
    assert [choose(one, logits) for _ in range(2)] == [1, 2]
    two = chooser(temperature=0, frequency_penalty=0.06)
    assert [choose(two, logits) for _ in range(4)] == [1, 1, 2, 1]


def test_repetition_penalty_counts_the_prompt_too() -> None:
    logits = torch.tensor([0.9, 1.0, -0.1])
    assert choose(chooser(temperature=0, repetition_penalty=2.0), logits) == 0


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_counts_each_token_once_wherever_it_was_seen(penalty: float) -> None:
    """Next to sorting prompt and answer for every token."""
    random = np.random.default_rng(0)
    prompt = random.integers(0, 40, 30).astype(np.int32)
    one = TokenChooser(SamplingParams(repetition_penalty=penalty, max_tokens=100), prompt, 0)
    answer = random.integers(0, 50, 60).tolist()  # some are in the prompt, some come twice, some are new
    for before, token in enumerate(answer):
        logits = torch.from_numpy(random.normal(size=50).astype(np.float32))
        expected, seen = logits.clone(), np.unique([*prompt, *answer[:before]])
        expected[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)[seen]
        if before not in (0, 1, 2, 20):  # it need not be asked for every token
            adjust(logits, one)
            assert torch.equal(logits, expected)
        one.note(token)


class WatchedPrompt:
    """Counts how often somebody looks at its tokens."""

    def __init__(self) -> None:
        self.looks = 0

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        self.looks += 1
        return PROMPT


@pytest.mark.parametrize(("penalty", "looks"), [(2.0, 1), (1.0, 0)])
def test_repetition_penalty_looks_at_the_prompt_once(penalty: float, looks: int) -> None:
    prompt = WatchedPrompt()
    params = SamplingParams(temperature=0, max_tokens=100, repetition_penalty=penalty, presence_penalty=0.1)
    one = TokenChooser(params, prompt, 0)  # type: ignore[arg-type]
    for _ in range(20):
        choose(one, torch.tensor([0.9, 1.0, -0.1, 0.95]))
    assert prompt.looks == looks


def test_a_temperature_or_a_share_next_to_nothing_takes_the_largest_logit() -> None:
    logits = torch.tensor([0.0, 3.0, 2.999])
    assert choose(chooser(temperature=1e-40), logits) == 1
    assert choose(chooser(top_p=1e-40), logits) == 1


def test_stop_tokens_do_not_wait_where_a_constraint_allows_nothing_else() -> None:
    params = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=(1, 3), min_tokens=2)
    logits = torch.tensor([[0.0, 9.0, 1.0, 8.0]])
    for allowed, chosen in (((1, 2, 3), 2), ((1, 3), 1), ((3,), 3), ((0,), 0)):
        one = TokenChooser(params, PROMPT, 0, Only(allowed))
        assert choose_tokens(logits, [one], OPS) == [chosen]


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([0.0, 9.0])
    one = chooser(temperature=0, stop_token_ids=(1,), min_tokens=2)
    assert [choose(one, logits) for _ in range(3)] == [0, 0, 1]


def test_a_seed_repeats_itself_and_choices_differ() -> None:
    logits = torch.zeros(50)

    def tokens(seed: int, index: int) -> list[int]:
        one = chooser(index, seed=seed)
        return [choose(one, logits) for _ in range(20)]

    assert tokens(1, 0) == tokens(1, 0)
    assert tokens(1, 0) != tokens(1, 1)
    assert tokens(1, 0) != tokens(2, 0)


def test_a_row_is_chosen_the_same_alone_and_among_others() -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    params = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.5}, {"temperature": 0, "presence_penalty": 1.0}]
    params += [{"seed": 3, "top_k": 5}, {"temperature": 0}]
    together = choose_tokens(logits, [chooser(**p) for p in params], OPS)
    assert together == [choose(chooser(**p), row) for p, row in zip(params, logits, strict=True)]


def test_which_of_equal_logits_is_named_depends_on_the_row_alone() -> None:
    """Each row has many ties; beside it stand rows that ask for more or fewer."""
    rows = torch.randint(0, 4, (60, 199), generator=torch.Generator().manual_seed(0)).float()
    wanted = [(0, 1, 2, 5, 20)[i % 5] for i in range(60)]
    together = log_probabilities(rows, [7] * 60, wanted, OPS)
    for row, n, entry in zip(rows, wanted, together, strict=True):
        assert log_probabilities(row[None], [7], [n], OPS) == [entry]
        assert len(entry.top) == n


def test_log_probabilities_are_the_models_own_and_include_the_best() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    entry, other = log_probabilities(torch.stack([logits, logits]), [0, 1], [2, 0], OPS)
    assert entry.logprob == pytest.approx(np.log(0.5))
    assert entry.top[0] == (0, entry.logprob)
    assert len(entry.top) == 2
    assert other.logprob == pytest.approx(np.log(0.25))
    assert other.top == ()


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("temperature", -0.1, "[0.0, 100.0]"),
        ("temperature", float("nan"), "[0.0, 100.0]"),
        ("top_p", 0.0, "(0.0, 1.0]"),
        ("top_p", 1.5, "(0.0, 1.0]"),
        ("top_k", -1, "[0, 2147483647]"),
        ("min_p", 2.0, "[0.0, 1.0]"),
        ("presence_penalty", 3.0, "[-2.0, 2.0]"),
        ("frequency_penalty", -3.0, "[-2.0, 2.0]"),
        ("repetition_penalty", 0.0, "(0.0, 100.0]"),
        ("max_tokens", -1, "[0, 2147483647]"),
        ("min_tokens", 101, "[0, 100]"),
        ("seed", 2**64, f"[{-(2**63)}, {2**63 - 1}]"),
        ("logit_bias", {3: 101.0}, "[-100.0, 100.0]"),
    ],
)
def test_a_parameter_out_of_range_names_its_value_and_bound(name: str, value: object, bound: str) -> None:
    with pytest.raises(BadSampling) as caught:
        chooser(**{name: value})
    assert name in str(caught.value)
    assert bound in str(caught.value)
    assert caught.value.param == name


def test_presence_is_taken_off_once_and_frequency_for_each_time() -> None:
    logits = torch.tensor([1.0, 1.5, 1.4])
    one, two = chooser(presence_penalty=0.2), chooser(frequency_penalty=0.2)
    for token in (1, 1, 2):
        one.note(token)
        two.note(token)
    for penalised, expected in ((one, [1.0, 1.3, 1.2]), (two, [1.0, 1.1, 1.2])):
        found = logits.clone()
        adjust(found, penalised)
        torch.testing.assert_close(found, torch.tensor(expected))
