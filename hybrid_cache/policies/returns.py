"""When will somebody come back to this prefix? Learned online from what the server sees.

A *place* is a position in a prompt where a state could be kept, kept or not. It *returns* when a later prompt runs
through it and through no deeper known place: that prompt would be resumed from there. A place's life starts when it is
made or returns, and ends when it returns (again). Lives are modelled by piecewise constant rates,

    rate(age) = exp(u[group, bucket of age] + w . features)          returns a second,

a Poisson regression on lives so far (Friedman 1982, "Piecewise exponential models for survival data with covariates").
A life that has not ended counts for the time it has lasted, so nothing waits for an answer that may never come, and
places that were never kept teach as much as those that were.

From the rates follows an index for each age: the best ratio, over all times to stop, of the chance that the place
returns before then to the expected time that it would be held (Gittins 1979). That is what an hour of memory is worth
to this place now, the future included: a chat that is read for a minute before it goes on is not given up meanwhile.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_BUCKETS = 17
EDGES = np.concatenate([[0.0], 2.0 ** np.arange(NUM_BUCKETS)])  # seconds: 0, 1, 2, 4 ... 65,536
WIDTHS = np.diff(EDGES)
NUM_GROUPS = 4  # lives of places that returned never before, once, more often
GRID = np.arange(-8.0, 8.01, 0.25)  # relative log-rates for which indices are tabulated
PRIOR_WEIGHT = 4.0  # returns that the prior is worth in each group
RIDGE = float(__import__("os").environ.get("RIDGE", 8.0))


def prior_rates() -> Floats:
    """Before anything is known: rate ~ 1 / age, which ranks by recency."""
    middle = (EDGES[:-1] + EDGES[1:]) / 2
    return np.asarray(0.15 / (middle + 20.0))


def bucket_of(age: Floats) -> NDArray[np.int64]:
    """Index of the bucket that holds an age in seconds."""
    exponents = np.frexp(np.maximum(age, 0.5))[1]  # age = m * 2**e with m in [0.5, 1)
    return np.asarray(np.clip(exponents, 0, NUM_BUCKETS - 1), dtype=np.int64)


def place_of(age: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Bucket that holds an age in seconds, and how far into it the age is, 0 to 1."""
    bucket = bucket_of(age)
    return bucket, np.minimum((age - EDGES[bucket]) / WIDTHS[bucket], 1.0)


def indices(rates: Floats) -> Floats:
    """rates [..., buckets] -> Gittins index at the start of each bucket, returns per second held."""
    hazard = rates * WIDTHS
    result = np.zeros_like(rates)
    stay = np.exp(-hazard)
    time = -np.expm1(-hazard) / np.maximum(rates, 1e-300)  # expected time in a bucket, once in it
    for first in range(NUM_BUCKETS):
        alive = np.ones(rates.shape[:-1])
        spent = np.zeros(rates.shape[:-1])
        best = np.zeros(rates.shape[:-1])
        for k in range(first, NUM_BUCKETS):
            spent = spent + alive * time[..., k]
            alive = alive * stay[..., k]
            best = np.maximum(best, (1.0 - alive) / spent)
        result[..., first] = best
    return np.concatenate([result, result[..., -1:]], axis=-1)


class ReturnModel:
    """Rates of return by group, age and features, refitted now and then to the latest lives."""

    def __init__(self, num_features: int, features_each: int, num_lives: int = 16384) -> None:
        self._features = np.zeros((num_lives, features_each), np.int32)
        self._group = np.zeros(num_lives, np.int8)
        self._start = np.zeros(num_lives)
        self._end = np.full(num_lives, np.inf)
        self._count = 0
        self.weights = np.zeros((NUM_GROUPS, num_features))
        self._u = np.log(np.tile(prior_rates(), (NUM_GROUPS, 1)))
        self._tabulate()

    def _tabulate(self) -> None:
        self.table = indices(np.exp(self._u[None, :, :] + GRID[:, None, None]))  # [grid, group, bucket]

    def begin(self, features: Sequence[int], group: int, now: float) -> int:
        """A life starts -> its number."""
        row = self._count % len(self._start)
        self._features[row] = features
        self._group[row] = group
        self._start[row] = now
        self._end[row] = np.inf
        self._count += 1
        return self._count - 1

    def end(self, life: int, now: float) -> None:
        """A life ends with a return."""
        if self._count - life <= len(self._start):
            self._end[life % len(self._start)] = now

    def change(self, life: int, features: Sequence[int]) -> None:
        if self._count - life <= len(self._start):
            self._features[life % len(self._start)] = features

    def level(self, features: Sequence[int], group: int) -> int:
        """Row of `table` for a place with these features."""
        log_rate = sum(map(self.weights[group].__getitem__, features))
        return min(max(int((log_rate - GRID[0]) * 4 + 0.5), 0), len(GRID) - 1)

    def at(self, level, group, age):
        bucket, part = place_of(np.asarray(age, dtype=np.float64))
        row = self.table[level, group]
        if row.ndim == 1:
            return row[bucket] * (1 - part) + row[bucket + 1] * part
        i = np.arange(len(row))
        return row[i, bucket] * (1 - part) + row[i, bucket + 1] * part

    def fit(self, now: float, rounds: int = 2) -> None:
        n = min(self._count, len(self._start))
        if n < 32:
            return
        ended = self._end[:n] < np.inf
        age = np.where(ended, self._end[:n], now) - self._start[:n]
        for g in range(NUM_GROUPS):
            mine = np.flatnonzero(self._group[:n] == g)
            if len(mine):
                self._fit_group(g, self._features[mine], ended[mine], age[mine], rounds)
        self._tabulate()

    def _fit_group(self, g, features, ended, age, rounds) -> None:
        exposure = np.clip(age[:, None] - EDGES[None, :-1], 0.0, WIDTHS[None, :])  # [n, buckets]
        n, d = len(age), self.weights.shape[1]
        returns = np.bincount(bucket_of(age[ended]), minlength=NUM_BUCKETS).astype(float)
        x = np.zeros((n, d), np.float32)
        x[np.arange(n)[:, None], features] = 1.0
        prior = prior_rates()
        for _ in range(rounds):
            relative = np.exp(np.clip((x @ self.weights[g].astype(np.float32)).astype(np.float64), -8, 8))
            at_risk = relative @ exposure
            # The prior says how rates fall with age; how high they are overall is learned first.
            scale = (returns.sum() + 1.0) / ((prior * at_risk).sum() + 1.0)
            expected = PRIOR_WEIGHT / NUM_BUCKETS
            self._u[g] = np.log((returns + expected) / (at_risk + expected / (prior * scale)))
            means = relative * (exposure @ np.exp(self._u[g]))
            gradient = x.T @ (ended - means).astype(np.float32) - RIDGE * self.weights[g]
            hessian = (x.T * means.astype(np.float32)) @ x + RIDGE * np.eye(d)
            step = np.linalg.solve(hessian, gradient)
            self.weights[g] += np.clip(step, -1.0, 1.0)
