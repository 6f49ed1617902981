"""Drift: do the scores of accepted parts still come from the law of the held-out good ones?

Ranks. Of the reference only scores strictly below the threshold ``t`` are used, and of the line likewise: given ``t``, which is one of the
held-out scores, these are i.i.d. (ties are broken by fixed random keys, so that any law counts as continuous). The ``m`` reference scores
divide the line of scores into ``m + 1`` bins whose unknown probabilities are Dirichlet(1, ..., 1) (Wilks 1941); so the next score falls
into bin ``k`` with probability ``w_k / W`` given all bins before, where ``w_k`` is 1 plus the scores of the line already in it (a Polya
urn), and ``W`` their sum. Merged bins add their weights. This is online smoothed conformal prediction (Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World", 2005) at the resolution of the reference: the ranks that `Drift.update` returns are independent
and uniform on [0, 1], for any law, any size of the reference and any length, and the state does not grow. Ranks in a fixed reference alone
are not uniform given that reference, and a long run finds out; ranks in a sliding window are not independent.

Bets. A bet is on a shift of the log-odds of the rank (in a logistic law, by `SHIFTS` standard deviations up or down). It turns weights
``w'``, as they were when the bet was last worth no more than it began with, into ``v'`` of the same sum, and holds that scores since then
fall by the urn that began with ``v'`` instead of ``w'``. Both urns learn from the scores since, so shifted scores that enter the weights do
not turn a right bet into a wrong one; what can be known of the shift is limited by ``w'`` alone. The e-value of a score in bin ``k`` is
``1 + (v'_k - w'_k) / w_k``; its mean without drift is 1.

Alarm. Each bet has a Shiryaev-Roberts sum ``R <- (1 + R) e``; the alarm is raised when their mean reaches ``N``, the parts per false alarm
(an e-detector: Shin, Ramdas and Rinaldo, "E-detectors", 2022). Without drift ``R_n - n`` is a martingale; so the mean number of parts until
a false alarm is at least ``N`` (optional stopping), and the probability of one within the first ``n`` parts is at most ``n / N`` (Doob).
Both are means over references as well as over parts, as the conformal promise is.

Delay. Median of inspected parts from shift to alarm at ``N = 100 000`` and 1 % false rejects, by `scripts/bench_drift.py` (normal
log-scores, the slower direction; "-": not within 2 000 parts in most streams):

    reference   shift from the first part on     shift after 1 000 good parts
                0.5 sd     1 sd     2 sd         0.5 sd     1 sd     2 sd
           20        -        -       87            126       38       34
          100        -       41       16             92       28       16
          400      135       32       18             89       30       16
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError, DataError, ModelFormatError, NotFiniteError
from gladad.decision.conformal import Calibration

SHIFTS = (0.5, 1.0, 2.0)
"""Sizes of the shifts that are bet on, in standard deviations of a logistic law."""
MAX_BINS = 32
"""Most bins that scores are counted in. More find nothing sooner."""
MIN_REFERENCE = 3
"""Fewest scores below the threshold that others are ranked among."""
MAX_WAITING = 2000
"""Most scores, of the reference and of the line, that a reference still to be completed may have: the state keeps them one by one."""
GRID = 256
"""About how many rows and columns of an image `appearance` looks at."""

_ODDS = np.exp([[sign * shift * math.pi / math.sqrt(3)] for shift in SHIFTS for sign in (1, -1)])  # [bets, 1]: up, down, up...
_MASK = (1 << 64) - 1


class Drift:
    """A sequential test that the scores of accepted parts are like the reference (see the module's text).

    Without drift, the mean number of accepted parts until a (false) alarm is at least ``parts_per_false_alarm``, and one comes within the
    first ``n`` with a probability of at most ``n / parts_per_false_alarm``. This asks for exchangeable parts. Neighbours that are alike are
    drift (lots of 250 whose means differ by 0.2 standard deviations raised an alarm within 5 000 parts in 19 of 20 simulated streams), and
    so is a reference of other models than the one at work. A small reference says little of a shift that was there from the first part on;
    the good parts of the line make up for it. Slow drift is compared with all before it.

    After an alarm nothing changes any more; once its cause is gone, make a new one. It works for any number with a law, such as those of
    `appearance`, with the threshold at infinity.
    """

    count: int  # scores below the threshold seen so far, without those after an alarm
    evidence: float  # >= 0; the alarm is raised at 1

    def __init__(
        self,
        reference: Sequence[float],
        threshold: float = math.inf,
        *,
        parts_per_false_alarm: float = 100_000,
        learn: int = 0,
        seed: int = 0,
    ):
        """Begin.

        Args:
            reference: Scores of held-out good images; those at or above the threshold are left out.
            threshold: The decision threshold: a score of the reference, or chosen without it. Infinity where nothing is rejected.
            parts_per_false_alarm: Above 1.
            learn: Number of first scores of the line that are added to the reference before the test begins; at most `MAX_WAITING` with it.
            seed: Of the random keys that break ties. The results are a function of it and of the scores.

        Raises:
            ConfigError: A number is out of its range.
            DataError: There are fewer than `MIN_REFERENCE` scores with those to learn, or one is not finite.
        """
        if not 1 < parts_per_false_alarm < math.inf:
            raise ConfigError(f"parts_per_false_alarm must be above 1 and finite, not {parts_per_false_alarm}")
        if learn < 0 or (learn and len(reference) + learn > MAX_WAITING):
            raise ConfigError(
                f"learn must be at least 0, and with the {len(reference)} reference scores at most {MAX_WAITING}, not {learn}"
            )
        if not threshold > -math.inf:
            raise ConfigError(f"the threshold of drift detection must be a number or infinity, not {threshold}")
        if not np.isfinite(np.asarray(reference, dtype=np.float64)).all():
            raise DataError("a reference score of drift detection is not finite")
        waiting = [float(score) for score in reference if score < threshold]
        if len(waiting) + learn < MIN_REFERENCE:
            raise DataError(
                f"drift detection needs at least {MIN_REFERENCE} good scores below the threshold, there are {len(waiting)}; "
                f"add good images, or let it learn from the first parts"
            )
        self.threshold, self.parts_per_false_alarm, self.seed = float(threshold), float(parts_per_false_alarm), int(seed)
        self.count, self.evidence = 0, 0.0
        self._base = _mixed(self.seed)
        self._learn, self._waiting = int(learn), waiting
        bets = len(_ODDS)
        self._edges: list[tuple[float, float]] = []  # between the bins, ascending: scores and their keys
        self._weights: NDArray[np.float64] = np.ones(1)  # [bins], and their sum
        self._total = 1.0
        self._before: NDArray[np.float64] = np.ones((bets, 1))  # [bets, bins]: the weights that a bet set out from (w')
        self._gains: NDArray[np.float64] = np.zeros((bets, 1))  # [bets, bins]: v' - w'
        self._worth: NDArray[np.float64] = np.ones(bets)  # product of a bet's e-values since then
        self._sums: NDArray[np.float64] = np.zeros(bets)  # R
        if not learn:
            self._open()

    @classmethod
    def for_calibration(cls, calibration: Calibration, *, parts_per_false_alarm: float = 100_000, learn: int = 200, seed: int = 0) -> Drift:
        """The test of a calibration's scores.

        Where they are of other models (cross-fitted), of copies or the worst of tolerated changes, they are no reference: the first
        ``learn`` accepted parts are.
        """
        reference, learn = (calibration.scores, 0) if calibration.is_reference else ((), learn)
        return cls(reference, calibration.threshold.value, parts_per_false_alarm=parts_per_false_alarm, learn=learn, seed=seed)

    @property
    def alarm(self) -> bool:
        """Whether drift was found."""
        return self.evidence >= 1

    @property
    def learning(self) -> int:
        """Accepted scores still to come before the test begins."""
        return self._learn

    @property
    def direction(self) -> Literal["up", "down"]:
        """Where scores went, if they did: "up" (noise, light; more false rejects) or "down" (out of focus; defects pass)."""
        return "down" if self._sums[1::2].sum() > self._sums[::2].sum() else "up"

    def update(self, score: float) -> float | None:
        """Take the score of the next part.

        Scores at or above the threshold are passed over, so that all may be given.

        Returns:
            Its rank in all before it, in [0, 1]: independent and uniform without drift, near 1 for a high score. None where it was
            passed over or learned, or after an alarm.

        Raises:
            NotFiniteError: The score is not finite. Nothing has changed.
        """
        score = float(score)
        if not math.isfinite(score):
            raise NotFiniteError(f"drift detection was given a score that is not finite ({score})")
        if score >= self.threshold or self.evidence >= 1:
            return None
        key, inside = self._uniform(2 * self.count), self._uniform(2 * self.count + 1)
        self.count += 1
        if self._learn:
            self._waiting.append(score)
            self._learn -= 1
            if not self._learn:
                self._open()
            return None
        k = bisect_right(self._edges, (score, key))
        weights = self._weights
        rank = (float(weights[:k].sum()) + inside * float(weights[k])) / self._total
        values = 1 + self._gains[:, k] / weights[k]
        weights[k] += 1
        self._total += 1
        self._sums = (1 + self._sums) * values
        self._worth *= values
        if (over := self._worth <= 1).any():
            self._worth[over] = 1
            self._before[over] = weights
            self._gains[over] = _gains(weights, _ODDS[over])
        self.evidence = float(self._sums.mean()) / self.parts_per_false_alarm
        return rank

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, of at most 50 kB."""
        state: dict[str, Any] = {
            "threshold": self.threshold if math.isfinite(self.threshold) else None,
            "parts_per_false_alarm": self.parts_per_false_alarm,
            "seed": self.seed,
            "count": self.count,
            "evidence": self.evidence,
        }
        if self._learn:
            return state | {"learn": self._learn, "waiting": [*self._waiting]}
        return state | {
            "edges": [list(edge) for edge in self._edges],
            "weights": self._weights.astype(int).tolist(),
            "before": self._before.astype(int).tolist(),
            "worth": self._worth.tolist(),
            "sums": self._sums.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Drift:
        """Read what `to_json` wrote; what follows is exactly what would have followed then.

        Raises:
            ModelFormatError: A key is missing, or a value cannot be one that was written.
        """
        try:
            threshold = math.inf if value["threshold"] is None else float(value["threshold"])
            parts, learn = float(value["parts_per_false_alarm"]), int(value.get("learn", MIN_REFERENCE))
            found = cls(value.get("waiting", ()), threshold, parts_per_false_alarm=parts, learn=learn, seed=int(value["seed"]))
            found.count, found.evidence = int(value["count"]), float(value["evidence"])
            if "waiting" not in value:
                found._restore(value)
            if found.count < 0 or not 0 <= found.evidence < math.inf:
                raise ValueError("count or evidence out of range")
        except (KeyError, TypeError, ValueError, OverflowError, ConfigError, DataError) as error:
            raise ModelFormatError(f"state of drift detection: key missing or wrong ({error})") from error
        return found

    def _restore(self, value: dict[str, Any]) -> None:
        """The part of `from_json` that a test that has begun has."""
        self._edges = [(float(score), float(key)) for score, key in value["edges"]]
        self._weights, self._before = (np.array(value[name], dtype=np.float64) for name in ("weights", "before"))
        self._worth, self._sums = (np.array(value[name], dtype=np.float64) for name in ("worth", "sums"))
        bets, bins = len(_ODDS), len(self._edges) + 1
        if self._weights.shape != (bins,) or self._before.shape != (bets, bins) or not self._worth.shape == self._sums.shape == (bets,):
            raise ValueError("lengths do not fit")
        if not (self._before >= 1).all() or not (self._before <= self._weights).all() or self._edges != sorted(self._edges):
            raise ValueError("weights or edges out of order")
        if not (np.isfinite([*self._weights, *self._worth, *self._sums]).all() and (self._worth >= 1).all() and (self._sums >= 0).all()):
            raise ValueError("a number is out of range")
        self._learn, self._waiting, self._total = 0, [], float(self._weights.sum())
        self._gains = np.concatenate([_gains(row, odds) for row, odds in zip(self._before, _ODDS[:, None], strict=True)])

    def _uniform(self, index: int) -> float:
        """The uniform number in [0, 1) of an index; those of the reference are negative."""
        return (_mixed(self._base + index) >> 11) * 2.0**-53

    def _open(self) -> None:
        """Make the bins of the reference, and all bets."""
        ranked = sorted((score, self._uniform(-1 - index)) for index, score in enumerate(self._waiting))
        spaces = len(ranked) + 1
        bins = min(spaces, MAX_BINS)
        cuts = [spaces * index // bins for index in range(bins + 1)]
        self._edges = [ranked[cut - 1] for cut in cuts[1:-1]]
        self._weights, self._total = np.diff(cuts).astype(np.float64), float(spaces)
        self._before, self._gains = np.tile(self._weights, (len(_ODDS), 1)), _gains(self._weights, _ODDS)
        self._waiting = []


def _gains(weights: NDArray[np.float64], odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """What bets change in the weights ``[K]`` of bins: ``[n, K]``, of sum 0, above ``-weights``, for odds ``[n, 1]``."""
    below = np.cumsum(weights)
    total = below[-1]
    shifted = total * below / (below + odds * (total - below))
    shifted[:, 1:] -= shifted[:, :-1].copy()
    return np.asarray(shifted - weights)


def _mixed(number: int) -> int:
    """64 random bits that belong to an integer (SplitMix64; Steele, Lea and Flood 2014)."""
    z = (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def appearance(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Brightness and sharpness of an image ``[H, W, 3]`` (uint8, at least 3x3), to be watched by a `Drift` each.

    Both look at about `GRID` x `GRID` places only.

    Returns:
        The mean level, in [0, 1]; and the mean absolute Laplacian of green (a pixel less the mean of its four neighbours) over the mean of
        green, in [0, 2], which blur lowers, noise raises and the strength of light leaves as it is (0 where green is black).

    Raises:
        DataError: It is not such an image.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 3:
        raise DataError(f"an image must be uint8 [H, W, 3] of at least 3x3, not {pixels.dtype} {list(pixels.shape)}")
    height, width = pixels.shape[:2]
    down, right = max(1, height // GRID), max(1, width // GRID)
    brightness = float(pixels[::down, ::right].mean()) / 255

    def green(row: int, column: int) -> NDArray[np.int16]:
        """Of the neighbours at an offset, in 0...2 each."""
        return pixels[row : height - 2 + row : down, column : width - 2 + column : right, 1].astype(np.int16)

    middle = green(1, 1)
    curvature = 4 * middle - green(0, 1) - green(2, 1) - green(1, 0) - green(1, 2)
    light = float(middle.mean())
    return brightness, float(np.abs(curvature).mean()) / 4 / light if light else 0.0
