"""False alarms and delays of drift detection, by simulation: python scripts/bench_drift.py [--share 1.0] [--seed 0].

About 5 000 streams of log-scores (fewer by --share) go through ``gladad.decision.drift.Drift`` one score at a time, each behind a
calibration of its own with its conformal threshold for 1 % false rejects. Prints Markdown tables. A delay counts inspected parts, rejected
ones too, from the first shifted one to the alarm; "-" where it is not reached within 2 000. Takes 6 minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np

from gladad.decision.conformal import conformal_threshold
from gladad.decision.drift import Drift

SIZES = (20, 100, 400)
"""Calibration scores."""
RATE = 0.01
LONGEST_DELAY = 2000
CHUNK = 500

Law = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """Log-scores of standard deviation 1."""
    return rng.normal(size=count)


def heavy(rng: np.random.Generator, count: int) -> np.ndarray:
    """Log-scores of Student's law with 3 degrees of freedom, standard deviation 1."""
    return rng.standard_t(3, size=count) / np.sqrt(3)


def whole(rng: np.random.Generator, count: int) -> np.ndarray:
    """Log-scores in steps of half a standard deviation: many ties."""
    return np.round(2 * rng.normal(size=count)) / 2


def with_bad(rng: np.random.Generator, count: int) -> np.ndarray:
    """2 % of parts are bad: log-scores 4 standard deviations higher, and twice as wide. Most are rejected, a few pass."""
    return np.where(rng.random(count) < 0.02, 4 + 2 * rng.normal(size=count), rng.normal(size=count))


def begin(law: Law, n: int, rng: np.random.Generator, parts_per_false_alarm: float) -> Drift:
    """The test behind a new calibration of ``n`` scores (without bad parts)."""
    scores = np.exp((normal if law is with_bad else law)(rng, n))
    threshold = conformal_threshold(scores.tolist(), RATE).value
    return Drift(scores.tolist(), threshold, parts_per_false_alarm=parts_per_false_alarm, seed=int(rng.integers(1 << 30)))


def parts(law: Law, rng: np.random.Generator, count: int, shift: float = 0.0) -> Iterator[float]:
    """Scores of ``count`` parts."""
    for start in range(0, count, CHUNK):
        yield from np.exp(law(rng, min(CHUNK, count - start)) + shift).tolist()


def run_length(drift: Drift, law: Law, rng: np.random.Generator, longest: int) -> int:
    """Accepted parts until the alarm, or ``longest`` where there is none among so many parts."""
    for score in parts(law, rng, longest):
        drift.update(score)
        if drift.alarm:
            return drift.count
    return longest


def delay(drift: Drift, law: Law, rng: np.random.Generator, before: int, shift: float) -> float:
    """Parts from the shift to the alarm: infinite where there is none, not a number where it came before."""
    for score in parts(law, rng, before):
        drift.update(score)
    if drift.alarm:
        return np.nan
    for index, score in enumerate(parts(law, rng, LONGEST_DELAY, shift), 1):
        drift.update(score)
        if drift.alarm:
            return index
    return np.inf


def delays_cell(law: Law, n: int, before: int, shift: float, streams: int, seed: tuple[int, ...]) -> str:
    """Median, 95 % and share of alarms."""
    found = []
    for index in range(streams):
        rng = np.random.default_rng((*seed, index))
        found.append(delay(begin(law, n, rng, 100_000), law, rng, before, shift))
    kept = np.array(found)[~np.isnan(found)]
    median, late = (np.quantile(kept, level, method="higher") for level in (0.5, 0.95))
    shown = [f"{value:.0f}" if np.isfinite(value) else "-" for value in (median, late)]
    return f"{shown[0]} / {shown[1]} / {np.isfinite(kept).mean():.0%}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def false_alarms(seed: int, scale: Callable[[int], int]) -> int:
    """Print the tables of run lengths without drift; returns the number of streams."""
    rows, done = [], 0
    for row, (name, law) in enumerate({"normal": normal, "heavy tails": heavy, "ties": whole}.items()):
        for n in SIZES:
            streams = scale(300 if law is normal else 50)
            lengths = []
            for index in range(streams):
                rng = np.random.default_rng((seed, 1, row, n, index))
                lengths.append(run_length(begin(law, n, rng, 1000), law, rng, 20_000))
            done += streams
            error = np.std(lengths) / np.sqrt(streams)
            early = [f"{np.mean(np.array(lengths) < count):.1%}" for count in (100, 500)]
            rows.append([name, str(n), str(streams), *early, f"{np.mean(lengths):.0f} ± {error:.0f}"])
    print("Without drift, 1 000 parts per false alarm promised (run lengths are cut at 20 000):\n")
    table(["law", "n", "streams", "alarm in 100 parts (<= 10 %)", "in 500 (<= 50 %)", "mean run (>= 1 000)"], rows)

    rows = []
    cases = [("normal", normal, 100, 25_000, 80), ("normal", normal, 20, 25_000, 40), ("normal", normal, 100, 100_000, 10)]
    for row, (name, law, n, length, wanted) in enumerate([*cases, ("2 % bad", with_bad, 100, 25_000, 40)]):
        streams = scale(wanted)
        alarms = 0
        for index in range(streams):
            rng = np.random.default_rng((seed, 2, row, index))
            drift = begin(law, n, rng, 100_000)
            run_length(drift, law, rng, length)
            alarms += drift.alarm
        done += streams
        bound = min(1, length / 100_000)
        rows.append([name, str(n), str(streams), str(length), f"{alarms} ({alarms / streams:.0%})", f"{bound:.0%}"])
    print("Without drift, the default of 100 000 parts per false alarm:\n")
    table(["law", "n", "streams", "parts", "streams with an alarm", "promised at most"], rows)
    return done


def delays(seed: int, scale: Callable[[int], int]) -> int:
    """Print the tables of delays; returns the number of streams."""
    done = 0
    shifts = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
    plan = [("normal", normal, n, before, 75) for before in (0, 1000) for n in SIZES]
    plan += [("heavy tails", heavy, n, 1000, 50) for n in SIZES] + [("2 % bad", with_bad, n, 1000, 16) for n in SIZES]
    rows = []
    for row, (name, law, n, before, wanted) in enumerate(plan):
        cells = []
        for column, shift in enumerate(shifts):
            cells.append(delays_cell(law, n, before, shift, scale(wanted), (seed, 3, row, column)))
            done += scale(wanted)
        rows.append([name, str(n), str(before), *cells])
    print("Parts from shift to alarm at 100 000 parts per false alarm (median / 95 % / streams with an alarm within 2 000):\n")
    table(["law", "n", "parts before", *(f"{shift:+g} sd" for shift in shifts)], rows)
    return done


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the streams")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def scale(streams: int) -> int:
        return max(2, round(streams * options.share))

    started = time.perf_counter()
    done = false_alarms(options.seed, scale) + delays(options.seed, scale)
    rng = np.random.default_rng(options.seed)
    drift = begin(normal, 100, rng, 1e12)
    scores = list(parts(normal, rng, 20_000))
    ticked = time.perf_counter()
    for score in scores:
        drift.update(score)
    each = (time.perf_counter() - ticked) / len(scores)
    print(f"{done} streams in {time.perf_counter() - started:.0f} s; {each * 1e6:.0f} microseconds per update")


if __name__ == "__main__":
    main()
