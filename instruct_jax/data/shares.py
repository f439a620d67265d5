"""Several sources of rows, drawn by weights: exact shares, a pure function of the position.

    ("a.jsonl*0.7", "b.jsonl*0.3")     seven rows of a to three of b

After any number of rows each source has come within one row of its share. The weights as whole
numbers without a common divisor, here 7 and 3, are what comes in one period of T rows. Within it
the j-th row of a source of weight w has a window, from (j - 1) T / w rounded down to j T / w
rounded up, and of those whose window is open the one that closes first is next (Baruah et al. 1996:
the windows of weights that sum to one row a place are always met).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from instruct_jax.data.rows import DataError
from instruct_jax.errors import ConfigError

# Of one period, which is worked out and kept.
LONGEST = 10_000
_WEIGHT = re.compile(r"(.+)\*(-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)")


def split_weight(name: str) -> tuple[str, Fraction | None]:
    """A path or hub id, and the weight that stands behind it.

    >>> split_weight("a.jsonl*0.7"), split_weight("part*.jsonl")
    (('a.jsonl', Fraction(7, 10)), ('part*.jsonl', None))
    """
    found = _WEIGHT.fullmatch(name)
    return (name, None) if found is None else (found[1], Fraction(found[2]))


def read_weights(names: Sequence[str], field: str) -> tuple[int, ...] | None:
    """The weights of the sources of `field`, as whole numbers; None where none is given.

    Raises ConfigError for a weight that is 0 or negative, for some sources without one, and for
    weights whose shares come out even only after more than LONGEST rows.
    """
    weights = [split_weight(name)[1] for name in names]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    for name, weight in zip(names, weights, strict=True):
        if weight is None:
            raise ConfigError(
                f"{field}: {name!r} has no weight and others have one: give one to each, as "
                f"'{name}*0.5', or to none"
            )
        if weight <= 0:
            raise ConfigError(
                f"{field}: {name!r}: expected a weight above 0; leave out what is not to be drawn"
            )
    common = math.lcm(*(weight.denominator for weight in given))
    whole = [int(weight * common) for weight in given]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > LONGEST:
        raise ConfigError(
            f"{field}: weights of {sum(whole):,} rows in all before shares are even, at most "
            f"{LONGEST:,}: give them fewer digits"
        )
    return tuple(whole)


@dataclass(frozen=True)
class Shares:
    """Of which source each row of a data set is, and how often each source comes."""

    source: np.ndarray  # int[N]
    weights: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """DataError where a source has no row."""
        counts = np.bincount(self.source, minlength=len(self.weights))
        for name, count in zip(self.names, counts, strict=True):
            if not count:
                raise DataError("no row is left to train on, and it has a weight", path=name)

    def counted(self, counts: Sequence[int]) -> "Shares":
        """Those of so many rows of each source, one source after the other."""
        source = np.repeat(np.arange(len(counts)), counts)
        return Shares(source, self.weights, self.names)


def schedule(weights: Sequence[int]) -> np.ndarray:
    """int64[sum of weights]: of which source the row at each place of a period is.

    >>> schedule((1, 2)), schedule((1,))
    (array([1, 0, 1]), array([0]))
    """
    total, came, places = sum(weights), [0] * len(weights), []
    for place in range(total):
        due = [s for s, w in enumerate(weights) if came[s] * total // w <= place]
        due = [s for s in due if came[s] < weights[s]]
        next_one = min(due, key=lambda s: -(-(came[s] + 1) * total // weights[s]))
        came[next_one] += 1
        places.append(next_one)
    return np.array(places, np.int64)


class Turns:
    """Whose turn it is at a position of an endless stream of rows of several sources."""

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = np.asarray(weights, np.int64)
        self._places = schedule(weights)
        each = self._places[:, None] == np.arange(len(weights))
        # How many of its source came before, within the period.
        self._before = (np.cumsum(each, axis=0) - 1)[np.arange(len(each)), self._places]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at positions int64[B], and how many rows of it came before: int64[B] each."""
        period, place = np.divmod(positions, len(self._places))
        source = self._places[place]
        return source, period * self._weights[source] + self._before[place]
