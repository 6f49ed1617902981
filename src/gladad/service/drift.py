"""Drift on the line: the tests of `gladad.decision.drift` on what is accepted, from one activation of a version to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select, update

from gladad.decision.conformal import Calibration
from gladad.decision.drift import MIN_REFERENCE, Drift
from gladad.service import audit
from gladad.service.decisions import ACCEPT, Row
from gladad.service.tables import products

LEARN = 200  # parts that a test learns from where the calibration is no reference
SCORE, APPEARANCE = "score", ("brightness", "sharpness")
SYSTEM = "gladad"  # who, where nobody asked


def new(calibration: Calibration, limit: float, parts_per_false_alarm: float) -> dict[str, Any]:
    """States of the tests of a version that has seen no part yet: of scores, brightness and sharpness, by these names.

    Scores are compared with the held-out ones, in units of the threshold; where these are no reference, and for the other two, the first
    parts are.

    Args:
        calibration: Of the version.
        limit: Its reject limit.
        parts_per_false_alarm: Of each test.
    """
    scores = [score / calibration.threshold.value for score in calibration.scores] if calibration.is_reference else []
    enough = sum(score < limit for score in scores) >= MIN_REFERENCE
    tests = {name: Drift((), parts_per_false_alarm=parts_per_false_alarm, learn=LEARN) for name in APPEARANCE}
    tests[SCORE] = Drift(scores if enough else (), limit, parts_per_false_alarm=parts_per_false_alarm, learn=0 if enough else LEARN)
    return {name: test.to_json() for name, test in tests.items()}


def watch(connection: Connection, product: str, rows: Sequence[Row]) -> None:
    """Mark decisions about a product where its promise is suspended, and let the tests see those that the active version accepted.

    An alarm of the scores suspends the promise for all later decisions; every alarm is an entry of the audit log.

    Args:
        connection: A transaction of `Record.write`.
        product: Of which product.
        rows: In order.
    """
    state = connection.execute(select(products.c.active, products.c.drift, products.c.suspended).where(products.c.name == product)).one()
    tests, suspended = {name: Drift.from_json(value) for name, value in (state.drift or {}).items()}, state.suspended
    for row in rows:
        row["promise_suspended"] = suspended is not None
        if row["version"] != state.active or row["decision"] != ACCEPT:
            continue
        for name, test in tests.items():
            if test.alarm:
                continue
            test.update(row[name])
            if test.alarm:
                content = {"decision": row["id"], "of": name, "direction": test.direction, "parts": test.count}
                audit.append(connection, "drift alarm", product, SYSTEM, content)
                if name == SCORE:
                    where = "higher" if test.direction == "up" else "lower"
                    suspended = f"the scores of accepted parts have become {where} (noticed at decision {row['id']}); calibrate anew"
    values = {"drift": {name: test.to_json() for name, test in tests.items()}, "suspended": suspended}
    connection.execute(update(products).where(products.c.name == product).values(**values))


def shown(states: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What there is to say about the tests: evidence (an alarm at 1), direction, parts seen, and parts still to learn from."""
    tests = {name: Drift.from_json(value) for name, value in (states or {}).items()}
    return {
        name: {"alarm": test.alarm, "evidence": test.evidence, "direction": test.direction, "parts": test.count, "learning": test.learning}
        for name, test in tests.items()
    }
