"""Decisions: made of an inspection and the limits of a version, kept with their audit entries, and found again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, insert, select

from gladad.core.errors import DataError
from gladad.service import audit
from gladad.service.record import Record, now
from gladad.service.station import UnknownError
from gladad.service.tables import decisions, verdicts

Row = dict[str, Any]
ACCEPT, WARN, REJECT = "accept", "warn", "reject"


def decide(score: float, warn_limit: float | None, reject_limit: float) -> str:
    """The decision about a finite score, in units of the model's threshold."""
    if score > reject_limit:
        return REJECT
    return WARN if warn_limit is not None and score > warn_limit else ACCEPT


def insert_all(connection: Connection, made: Sequence[tuple[Row, str]]) -> None:
    """Keep decisions, each with who asked for it, and their audit entries, within a transaction of `Record.write`."""
    connection.execute(insert(decisions), [row for row, _ in made])
    audit.append_all(connection, [(audit.DECISION, row["id"], who, {"sha256": audit.row_digest(row)}) for row, who in made])


def first_id(time: str) -> str:
    """The least ID of a decision that was made at a time, ISO 8601 in UTC, or later, to the millisecond.

    Raises:
        DataError: It is no time.
    """
    try:
        moment = datetime.fromisoformat(time)
    except ValueError as error:
        raise DataError(f"time {time!r}: {error}; write it like 2026-01-31 or 2026-01-31T12:00") from error
    seconds = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    return f"{max(0, int(seconds * 1000)):012x}"


def one(connection: Connection, identity: str) -> Row:
    """A decision, with the last verdict on it as ``verdict``.

    Raises:
        UnknownError: There is none of this ID.
    """
    found = connection.execute(_selected().where(decisions.c.id == identity)).first()
    if found is None:
        raise UnknownError(f"there is no decision {identity!r}")
    return dict(found._mapping)


def search(
    connection: Connection,
    *,
    product: str | None = None,
    decision: str | None = None,
    verdict: str | None = None,
    since: str | None = None,
    until: str | None = None,
    before: str | None = None,
    limit: int = 100,
) -> list[Row]:
    """Decisions, the newest first.

    Args:
        connection: A transaction.
        product: Of this product.
        decision: "accept", "warn" or "reject".
        verdict: "good", "bad" or "none".
        since: Not before this time, ISO 8601 in UTC.
        until: Before this time.
        before: ID of the last decision of the page before.
        limit: Most that are returned.
    """
    query = _selected()
    last = _last_verdict()
    conditions: list[tuple[Any, Callable[[], ColumnElement[bool]]]] = [
        (product, lambda: decisions.c.product == product),
        (decision, lambda: decisions.c.decision == decision),
        (since, lambda: decisions.c.id >= first_id(str(since))),
        (until, lambda: decisions.c.id < first_id(str(until))),
        (before, lambda: decisions.c.id < before),
        (verdict, lambda: last.is_(None) if verdict == "none" else last == verdict),
    ]
    query = query.where(*(condition() for value, condition in conditions if value is not None))
    return [dict(row._mapping) for row in connection.execute(query.order_by(decisions.c.id.desc()).limit(limit))]


def add_verdict(record: Record, identity: str, verdict: str, who: str, note: str = "") -> None:
    """Keep what a person says of a part; a later verdict supersedes an earlier one, which stays.

    Raises:
        UnknownError: There is no such decision.
    """
    with record.write() as connection:
        one(connection, identity)
        sequence = audit.append(connection, audit.VERDICT, identity, who, {"verdict": verdict, "note": note})
        row = {"sequence": sequence, "decision_id": identity, "time": now(), "who": who, "verdict": verdict, "note": note}
        connection.execute(insert(verdicts), [row])


def counts(connection: Connection, product: str) -> dict[str, int]:
    """How many parts were accepted, warned of and rejected."""
    query = select(decisions.c.decision, func.count()).where(decisions.c.product == product).group_by(decisions.c.decision)
    found = {decision: count for decision, count in connection.execute(query)}
    return {decision: found.get(decision, 0) for decision in (ACCEPT, WARN, REJECT)}


def judged(connection: Connection, product: str) -> dict[str, int]:
    """How many parts people called good and bad, by their last verdicts."""
    last = select(func.max(verdicts.c.sequence)).group_by(verdicts.c.decision_id)
    query = select(verdicts.c.verdict, func.count()).join(decisions, verdicts.c.decision_id == decisions.c.id)
    query = query.where(decisions.c.product == product, verdicts.c.sequence.in_(last)).group_by(verdicts.c.verdict)
    return {"good": 0, "bad": 0} | {verdict: count for verdict, count in connection.execute(query)}


def periods(connection: Connection, product: str, since: datetime, until: datetime, count: int) -> list[Row]:
    """What was decided in so many equal periods."""
    bounds = [since + (until - since) * number / count for number in range(count + 1)]
    found = []
    for start, end in pairwise(bounds):
        first, last = (first_id(moment.isoformat()) for moment in (start, end))
        query = select(decisions.c.decision, func.count()).where(
            decisions.c.product == product,
            decisions.c.decision.in_((ACCEPT, WARN, REJECT)),
            decisions.c.id >= first,
            decisions.c.id < last,
        )
        numbers = {decision: number for decision, number in connection.execute(query.group_by(decisions.c.decision))}
        times = {"since": start.isoformat(timespec="seconds"), "until": end.isoformat(timespec="seconds")}
        found.append(times | {decision: numbers.get(decision, 0) for decision in (ACCEPT, WARN, REJECT)})
    return found


def scores(connection: Connection, product: str, limit: int) -> list[Row]:
    """Scores and verdicts of the newest decisions about a product, the newest first."""
    columns = decisions.c.id, decisions.c.version, decisions.c.score, decisions.c.decision, _last_verdict().label("verdict")
    query = select(*columns).where(decisions.c.product == product).order_by(decisions.c.id.desc()).limit(limit)
    return [dict(row._mapping) for row in connection.execute(query)]


def plain(row: Row) -> Row:
    """A row for tables: regions as JSON text."""
    return row | {"regions": json.dumps(row["regions"])}


def _last_verdict() -> Any:
    last = select(func.max(verdicts.c.sequence)).where(verdicts.c.decision_id == decisions.c.id).correlate(decisions).scalar_subquery()
    return select(verdicts.c.verdict).where(verdicts.c.sequence == last).correlate(decisions).scalar_subquery()


def _selected() -> Select[Any]:
    return select(decisions, _last_verdict().label("verdict"))
