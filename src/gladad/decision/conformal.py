"""Decisions with a known error rate, learned from held-out *normal* images only.

The decision threshold is a split-conformal quantile (Vovk et al. 2005; Lei et al., JASA 2018): with ``n`` held-out normal scores and a
requested false-reject rate ``a``, the threshold is the ``ceil((n + 1)(1 - a))``-th smallest of them. For a new normal image that is
exchangeable with them, ``P(score > threshold) <= a``, for any distribution and any model. That rank exists only when
``n >= 1/a - 1`` (99 images for 1 %). With fewer the best promise that they allow is given instead: the threshold is the largest
held-out score, and ``P(score > threshold) <= 1 / (n + 1)``. Only where scores are of copies there is none: the threshold is then the
largest or the quantile of a normal law fitted to the logarithm of the scores, whichever is larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.core.storage import content_digest

MIN_HELD_OUT = 4
"""Fewest held-out normal images that a calibration is made from."""
HELD_OUT_SHARE, MANY_IMAGES, MAX_HELD_OUT = 0.2, 200, 300
"""See `images_to_hold_out`."""


@dataclass(frozen=True)
class Threshold:
    """A decision threshold and what is known of it.

    Its method is "conformal" (the promised rate is guaranteed), "cross-fitted" (the same rank of scores of other models than the final one:
    it holds approximately) or "copies" (scores of copies of a few images: nothing is promised).
    """

    value: float  # scores above it are rejected
    false_reject_rate: float  # asked for
    n: int  # held-out normal images it was made from
    method: str
    needed: int  # held-out images from which on the guarantee would hold
    tolerated: tuple[str, ...] = ()  # changes of a picture: each score is the worst of an image as it is and under all of these

    @property
    def statement(self) -> str:
        """One sentence for people."""
        rate, good = f"{self.promised_rate:.2%}", f"good parts like the {self.n} held-out ones"
        if self.tolerated:
            good += f", as they are or under any one change of {', '.join(self.tolerated)} of severity 1,"
        short = self.promised_rate > self.false_reject_rate * (1 + 1e-9)
        more = f"; {self.false_reject_rate:.2%} would need {self.needed} of them" if short else ""
        if self.method == "conformal":
            low, high = self.likely_rates
            drawn = f"on average over draws of such images; with nine draws of ten the rate lies between {low:.2%} and {high:.2%}"
            return f"at most {rate} of {good} are rejected (split-conformal, finite-sample guarantee{more}), {drawn}"
        if self.method == "cross-fitted":
            return f"about {rate} of {good} are rejected, or fewer (cross-fitted: an approximation, no guarantee{more})"
        return f"no guarantee: the threshold is extrapolated from the scores of copies of {self.n} image{'s' if self.n > 1 else ''}"

    @property
    def promised_rate(self) -> float:
        """Of false rejects: the rate asked for, or the smallest that so many images can promise; 1 where they are copies."""
        return 1.0 if self.method == "copies" else max(self.false_reject_rate, 1 / (self.n + 1))

    @property
    def likely_rates(self) -> tuple[float, float]:
        """Between which the rate of false rejects lies with nine of ten draws of the held-out images (5 % and 95 % quantiles).

        A promised rate is a mean over draws. That of one draw has a beta distribution (Vovk, "Conditional validity of inductive conformal
        predictors", 2012), if scores are continuous: the threshold is an order statistic.
        """
        from scipy.special import betaincinv  # late: inspection does without

        above = self.n + 1 - rank_of(self.n, self.false_reject_rate)
        low, high = (float(betaincinv(above, self.n + 1 - above, share)) for share in (0.05, 0.95))
        return low, high


def rank_of(count: int, false_reject_rate: float) -> int:
    """Which of so many scores, from the smallest on, is the threshold; the largest where they are too few for the rate."""
    return min(math.ceil((count + 1) * (1 - false_reject_rate) - 1e-9), count)


def required_images(false_reject_rate: float) -> int:
    """Held-out normal images needed for the conformal guarantee: the smallest ``n`` with ``n >= 1/a - 1``."""
    return math.ceil(1 / false_reject_rate - 1 - 1e-9)


def images_to_hold_out(images: int, false_reject_rate: float) -> int:
    """How many of so many different good images to hold out, at most `MAX_HELD_OUT`; the same for all rates from 1 % on.

    A fifth, or 99 where `MANY_IMAGES` are left to learn from, or 199, so that no single image sets a threshold of 1 %, where twice as many
    are left. Of n + 1 images a threshold rejects a whole number. So n is one less than a multiple of 100 where it can be: with any more the
    rate would be smaller than asked for, and the threshold higher. Rates below 1 % take multiples of what their guarantee needs.
    """
    multiple = max(100, required_images(false_reject_rate) + 1)
    spared = (min(times * multiple - 1, images - times * MANY_IMAGES) for times in (1, 2))
    most = min(max(images * HELD_OUT_SHARE, *spared), MAX_HELD_OUT)
    used = int(most + 1) // multiple * multiple
    return used - 1 if used else round(most)


def check_rate(false_reject_rate: float) -> None:
    """Refuse rates outside (0, 0.5] by a `ConfigError`."""
    if not 0 < false_reject_rate <= 0.5:
        raise ConfigError(f"false_reject_rate must be above 0 and at most 0.5, not {false_reject_rate}")


def conformal_threshold(
    normal_scores: Sequence[float], false_reject_rate: float, *, cross_fitted: bool = False, images: int | None = None
) -> Threshold:
    """The decision threshold for a requested false-reject rate (see the module's text).

    Args:
        normal_scores: Raw scores.
        false_reject_rate: In (0, 0.5].
        cross_fitted: Each score comes from a model of its own fold, not from the one that will be used.
        images: Number of different images behind the scores, where some are of copies of others.

    Raises:
        ConfigError: The rate is not in (0, 0.5].
        DataError: There are fewer than four scores, or one is not finite.
    """
    check_rate(false_reject_rate)
    scores = np.sort(np.asarray(normal_scores, dtype=np.float64))
    n = len(scores)
    if n < MIN_HELD_OUT:
        raise DataError(f"calibration needs at least {MIN_HELD_OUT} held-out good images, there are {n}; add good images")
    if not np.isfinite(scores).all():
        raise DataError("a held-out good image has a score that is not finite; the model is of no use, train it anew")
    copies = images is not None and images < n
    needed = required_images(false_reject_rate)
    if not copies:
        value = float(scores[rank_of(n, false_reject_rate) - 1])
        return Threshold(value, false_reject_rate, n, "cross-fitted" if cross_fitted else "conformal", needed)
    logs = np.log(np.maximum(scores, 1e-12))
    fitted = math.exp(float(logs.mean()) + NormalDist().inv_cdf(1 - false_reject_rate) * float(logs.std(ddof=1)))
    return Threshold(max(float(scores[-1]), fitted), false_reject_rate, images or n, "copies", needed)


@dataclass(frozen=True)
class Calibration:
    """What inspection needs to know of normal images.

    Where it is cross-fitted, each score comes from a model that did not see its image, over folds of all images (then the guarantee is
    approximate: the final model saw more images than each fold's).
    """

    scores: tuple[float, ...]  # sorted raw scores of the held-out normal images
    threshold: Threshold  # on the raw score
    pixel_threshold: float  # of the raw map, for masks
    cross_fitted: bool = False

    def p_value(self, score: float) -> float:
        """Conformal p-value, ``(1 + #{held-out >= score}) / (n + 1)``, in (0, 1].

        Where scores are of copies it is no smaller than it can be for the number of different images.
        """
        above = len(self.scores) - int(np.searchsorted(self.scores, score, side="left"))
        return max((1 + above) / (len(self.scores) + 1), 1 / (self.threshold.n + 1))

    @property
    def is_reference(self) -> bool:
        """Whether the scores are those of good parts as they come: by this model, not of copies, nor the worst of tolerated changes."""
        return self.threshold.method == "conformal" and not self.threshold.tolerated

    @property
    def identity(self) -> str:
        """What it is called: the start of the SHA-256 of the held-out scores and thresholds."""
        return content_digest(self.to_json())[:16]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        found = asdict(self) | {"statement": self.threshold.statement}
        if not self.threshold.tolerated:
            del found["threshold"]["tolerated"]  # as before there were any: what a calibration is called stays
        return found

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            ModelFormatError: A key is missing or of the wrong type, or a number is not finite.
        """
        try:
            scores, pixel_threshold = tuple(map(float, value["scores"])), float(value["pixel_threshold"])
            threshold = Threshold(**value["threshold"])
            threshold = replace(threshold, tolerated=tuple(threshold.tolerated))
            found = cls(scores, threshold, pixel_threshold, bool(value["cross_fitted"]))
            numbers = (*found.scores, found.threshold.value, found.pixel_threshold)
            if not np.isfinite(numbers).all() or min(numbers[-2:]) <= 0:
                raise ValueError("a score or threshold is not finite, or a threshold is not positive")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFormatError(f"calibration.json: key missing or wrong ({error})") from error
        return found


def calibrate(
    scores: Sequence[float],
    peaks: Sequence[float],
    false_reject_rate: float,
    *,
    cross_fitted: bool = False,
    images: int | None = None,
    tolerated: Sequence[str] = (),
) -> Calibration:
    """Fit the decision and the pixel threshold on held-out normal images.

    The pixel threshold is chosen the same way from the ``peaks``, the largest raw map value of each image, so that a normal image has any
    masked pixel at all with about the requested probability. The other arguments are those of `conformal_threshold`, and what is told of
    the threshold as ``tolerated``.

    Raises:
        DataError: As for `conformal_threshold`; or a threshold would be 0, in whose units nothing can be said.
    """
    threshold, pixel_threshold = (
        conformal_threshold(values, false_reject_rate, cross_fitted=cross_fitted, images=images) for values in (scores, peaks)
    )
    if min(threshold.value, pixel_threshold.value) <= 0:
        raise DataError("held-out good images score 0, so nothing can be measured against them; are they all the same picture?")
    threshold = replace(threshold, tolerated=tuple(tolerated))
    return Calibration(tuple(sorted(map(float, scores))), threshold, pixel_threshold.value, cross_fitted)
