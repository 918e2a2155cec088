"""When will a request return to this prefix? Learned online from what a server sees anyway.

A *life* begins when a place in a prompt is made or returned to, and ends when it is returned to (again). The chance
that it ends now depends on its age and on what is known of the place. It is modelled by piecewise constant rates,

    rate(age) = exp(u[bucket of age] + w . features)          returns a second,

one Poisson regression for each group of lives (Friedman 1982, "Piecewise exponential models for survival data with
covariates"). A life that has not ended counts for the time it has lasted, so nothing waits for an answer that may never
come, and places whose state was not kept teach as much as those whose state was.

From the rates follows an *index* for each age: the best ratio, over all times to stop, of the chance that the place is
returned to before then to the expected time until then (Gittins 1979). It is what a second of memory is worth to this
place now, its future included: a chat that is read for a minute before it goes on is not given up within that minute.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bound = float | Ints | list[int]  # of all numbers in an array, or of each column

NUM_BUCKETS = 17
EDGES = np.concatenate([[0.0], 2.0 ** np.arange(NUM_BUCKETS)])  # seconds: 0, 1, 2, 4 ... 65,536
WIDTHS = np.diff(EDGES)
MOST_LIVES = 4096  # of each group, the latest
FEWEST_LIVES = 16
RIDGE = 10.0  # pulls weights towards zero as that many returns pull them away; those of one session are alike
PRIOR_RETURNS = 4.0  # what the prior for the shape of the rates weighs, in returns
LEVELS = [i / 4 for i in range(-32, 33)]  # values of w . features for which indices are tabulated
# What is believed of another process, either way: a logarithm of a rate or a weight, seconds, and a count.
MOST_LOG, MOST_AGE_S, MOST_COUNT = 500.0, 1e12, 1 << 60


def prior_rates() -> Floats:
    """Before anything is known the rate falls as 1 / age, which ranks by recency."""
    return np.asarray(0.15 / ((EDGES[:-1] + EDGES[1:]) / 2 + 20.0))


def buckets(age: Floats) -> Ints:
    """The bucket that holds each age in seconds."""
    exponents = np.frexp(np.maximum(age, 0.5))[1]  # age = m * 2**exponent with 0.5 <= m < 1
    return np.clip(exponents, 0, NUM_BUCKETS - 1).astype(np.int64)


def gittins(rates: Floats) -> Floats:
    """rates [..., buckets] -> the index at the start of each bucket [..., buckets], returns a second."""
    hazard = rates * WIDTHS
    stay, time = np.exp(-hazard), -np.expm1(-hazard) / np.maximum(rates, 1e-300)
    result = np.zeros_like(rates)
    for first in range(NUM_BUCKETS):
        alive, spent = np.ones(rates.shape[:-1]), np.zeros(rates.shape[:-1])
        for k in range(first, NUM_BUCKETS):
            spent = spent + alive * time[..., k]
            alive = alive * stay[..., k]
            result[..., first] = np.maximum(result[..., first], (1.0 - alive) / spent)
    return result


def checked(arrays: Mapping[str, Array], name: str, shape: tuple[int, ...], low: Bound, high: Bound) -> Array:
    """One of the arrays of another process. Raises ValueError if it is of another shape, or a number is not within
    [low, high].
    """
    if name not in arrays:
        raise ValueError(f"there is no {name}")
    found = arrays[name]
    if found.shape != shape:
        raise ValueError(f"{name} {found.shape}, must be {shape}")
    values = found.astype(np.float64)
    if not ((values >= low) & (values <= high)).all():
        raise ValueError(f"{name} out of {low} to {high}")
    return found


class Lives:
    """The latest lives of one group, in a ring."""

    def __init__(self, num_features: int, most: int) -> None:
        self.features = np.zeros((most, num_features), np.int64)
        self.start = np.zeros(most)
        self.end = np.full(most, np.inf)
        self.most = most
        self.count = 0

    def begin(self, features: Sequence[int], now: float) -> int:
        """A life starts -> its number."""
        row = self.count % self.most
        self.features[row], self.start[row], self.end[row] = features, now, np.inf
        self.count += 1
        return self.count - 1

    def row(self, life: int) -> int | None:
        """Where a life is, unless later ones have taken its place."""
        return life % self.most if 0 < self.count - life <= self.most else None

    @classmethod
    def of(cls, arrays: Mapping[str, Array], name: str, sizes: Ints, most: int, now: float) -> "Lives":
        """Those that another process has seen. Raises ValueError."""
        count = int(checked(arrays, f"{name}.count", (2,), [0, most], [MOST_COUNT, most])[0])
        lives, n = cls(len(sizes), most), min(count, most)
        lives.count = count
        lives.features[:n] = checked(arrays, f"{name}.features", (n, len(sizes)), 0, sizes - 1)
        lives.start[:n] = now - checked(arrays, f"{name}.start", (n,), -MOST_AGE_S, MOST_AGE_S)
        lives.end[:n] = now - checked(arrays, f"{name}.end", (n,), -np.inf, MOST_AGE_S)  # minus infinity: it has not
        return lives


class ReturnModel:
    """Rates of return by group, age and features; `fit` learns them from the lives so far."""

    def __init__(self, odds: Sequence[float], sizes: Sequence[int], most_lives: int = MOST_LIVES) -> None:
        """`odds`: how likely a return is in each group before anything is known; `sizes`: values of each feature."""
        self._prior = np.outer(odds, prior_rates())
        num_groups = len(odds)
        self._sizes = np.array(sizes, np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._lives = [Lives(len(sizes), most_lives) for _ in range(num_groups)]
        self._edges, self._widths = EDGES.tolist(), WIDTHS.tolist()
        self._u = np.log(self._prior)  # [groups, buckets]
        self._w = np.zeros((num_groups, sum(sizes)))
        self._tabulate()

    def begin(self, group: int, features: Sequence[int], now: float) -> int:
        """A life starts -> its number."""
        return self._lives[group].begin(features, now)

    def end(self, group: int, life: int, now: float) -> None:
        """A life ends with a return."""
        lives = self._lives[group]
        if (row := lives.row(life)) is not None:
            lives.end[row] = now

    def change(self, group: int, life: int, features: Sequence[int]) -> None:
        """More is known of a place now."""
        lives = self._lives[group]
        if (row := lives.row(life)) is not None:
            lives.features[row] = features

    def level(self, groups: Ints, features: Ints) -> Ints:
        """groups [n], features [n, features] -> rows of the table of indices [n]."""
        log_rate = self._w[groups[:, None], features + self._offsets].sum(1)
        return np.asarray(np.clip(((log_rate - LEVELS[0]) * 4 + 0.5).astype(np.int64), 0, len(LEVELS) - 1))

    def index(self, groups: Ints, levels: Ints, ages: Floats) -> Floats:
        """Returns a second that holding each place is worth now, all arguments [n]. A negative age, of what
        was used after the clock was read, counts as zero.
        """
        ages = np.maximum(ages, 0.0)
        bucket = buckets(ages)
        part = np.minimum((ages - EDGES[bucket]) / WIDTHS[bucket], 1.0)
        here, there = self._table[groups, levels, bucket], self._table[groups, levels, bucket + 1]
        return np.asarray(here + part * (there - here))

    def index_of(self, group: int, features: Sequence[int], age: float) -> float:
        """`index` of one place: the same numbers without the cost of arrays."""
        age = max(age, 0.0)
        log_rate = sum(map(operator.getitem, self._weights[group], features))
        level = min(max(int((log_rate - LEVELS[0]) * 4 + 0.5), 0), len(LEVELS) - 1)
        bucket = min(max(math.frexp(max(age, 0.5))[1], 0), NUM_BUCKETS - 1)
        part = min((age - self._edges[bucket]) / self._widths[bucket], 1.0)
        row = self._indices[group][level]
        here, there = row[bucket], row[bucket + 1]
        return float(here + part * (there - here))

    def fit(self, now: float) -> None:
        """A step of Newton's method for each group's weights; its rates by age have a closed form."""
        for group, lives in enumerate(self._lives):
            n = min(lives.count, lives.most)
            if n >= FEWEST_LIVES:
                ended = lives.end[:n] < np.inf
                age = np.where(ended, lives.end[:n], now) - lives.start[:n]
                for _ in range(2):
                    self._fit_group(group, lives.features[:n] + self._offsets, ended, age)
        self._tabulate()

    def _fit_group(self, group: int, features: Ints, ended: NDArray[np.bool_], age: Floats) -> None:
        n, prior, w = len(age), self._prior[group], self._w[group]
        exposure = np.clip(age[:, None] - EDGES[:-1], 0.0, WIDTHS)  # [n, buckets] seconds
        returns = np.bincount(buckets(age[ended]), minlength=NUM_BUCKETS)
        relative = np.exp(np.clip(w[features].sum(1), LEVELS[0], LEVELS[-1]))
        at_risk = relative @ exposure
        # The prior says how rates fall with age; how high they are overall is learned first.
        scale = (returns.sum() + 1.0) / (prior @ at_risk + 1.0)
        weight = PRIOR_RETURNS / NUM_BUCKETS
        self._u[group] = np.log((returns + weight) / (at_risk + weight / (prior * scale)))
        means = (relative * (exposure @ np.exp(self._u[group]))).astype(np.float32)
        x = np.zeros((n, len(w)), np.float32)
        x[np.arange(n)[:, None], features] = 1.0
        gradient = x.T @ (ended - means) - RIDGE * w
        hessian = (x.T * means) @ x + RIDGE * np.eye(len(w))
        w += np.clip(np.linalg.solve(hessian, gradient), -1.0, 1.0)

    # For a process that comes later

    def arrays(self, now: float) -> dict[str, Array]:
        """All that was learned, and the lives that it was learned from; times as ages."""
        found: dict[str, Array] = {"u": self._u, "w": self._w}
        for group, lives in enumerate(self._lives):
            n = min(lives.count, lives.most)
            found[f"lives.{group}.count"] = np.array([lives.count, lives.most])
            found[f"lives.{group}.features"] = lives.features[:n].astype(np.int16)
            found[f"lives.{group}.start"] = now - lives.start[:n]
            found[f"lives.{group}.end"] = now - lives.end[:n]
        return found

    def take(self, arrays: Mapping[str, Array], now: float) -> None:
        """The opposite. Raises ValueError, and changes nothing, for what cannot come from `arrays` of such a model."""
        u, w = (checked(arrays, each, own.shape, -MOST_LOG, MOST_LOG) for each, own in (("u", self._u), ("w", self._w)))
        most = self._lives[0].most
        lives = [Lives.of(arrays, f"lives.{group}", self._sizes, most, now) for group in range(len(self._lives))]
        self._u[:], self._w[:], self._lives = u, w, lives
        self._tabulate()

    def _tabulate(self) -> None:
        """Indices [groups, levels, buckets + 1]; the last bucket has no end."""
        table = gittins(np.exp(self._u[:, None, :] + np.array(LEVELS)[None, :, None]))
        self._table = np.concatenate([table, table[..., -1:]], axis=-1)
        self._indices: list[list[list[float]]] = self._table.tolist()
        self._weights = [[part.tolist() for part in np.split(w, self._offsets[1:])] for w in self._w]
