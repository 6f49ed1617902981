"""The audit log: one chain of entries, each of which holds the hash of the one before. What was decided cannot be changed unseen.

``hash = SHA-256(previous hash + canonical JSON of the entry)``, from 64 zeros. An entry of a decision holds the SHA-256 of its row, so that
verification finds rows that were changed, added or removed. Whoever may write the database could make the whole chain anew, or cut its end
off: note the head's hash elsewhere now and then, and give it to `verify`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select

from gladad.core.errors import GladError
from gladad.service.record import Record, now
from gladad.service.tables import audit, decisions, verdicts

START = "0" * 64
DECISION, VERDICT = "decision", "verdict"
CHUNK = 10_000


class AuditError(GladError):
    """The record is not what was written: the message says where it differs first."""


@dataclass(frozen=True)
class Head:
    """The last entry."""

    sequence: int  # 0: there is none
    hash: str


def canonical(value: Any) -> str:
    """JSON of which there is one for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def row_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 of the row of a decision."""
    return hashlib.sha256(canonical(dict(row)).encode()).hexdigest()


def head(connection: Connection) -> Head:
    """The last entry of the chain."""
    last = connection.execute(select(audit.c.sequence, audit.c.hash).order_by(audit.c.sequence.desc()).limit(1)).first()
    return Head(0, START) if last is None else Head(last.sequence, last.hash)


def about(connection: Connection, subject: str) -> list[dict[str, Any]]:
    """The entries about something, such as the ID of a decision, the oldest first."""
    found = connection.execute(select(audit).where(audit.c.subject == subject).order_by(audit.c.sequence))
    return [dict(row._mapping) | {"content": json.loads(row.content)} for row in found]


def append(connection: Connection, kind: str, subject: str, who: str, content: Mapping[str, Any]) -> int:
    """Add an entry within a transaction of `Record.write`; returns its sequence number."""
    return append_all(connection, [(kind, subject, who, content)]).sequence


def append_all(connection: Connection, entries: list[tuple[str, str, str, Mapping[str, Any]]]) -> Head:
    """Add entries (kind, subject, who, content), in order; returns the new head."""
    last = head(connection)
    rows = []
    for kind, subject, who, content in entries:
        row = {
            "sequence": last.sequence + 1,
            "time": now(),
            "who": who,
            "kind": kind,
            "subject": subject,
            "content": canonical(dict(content)),
        }
        last = Head(last.sequence + 1, _link(last.hash, row))
        rows.append(row | {"hash": last.hash})
    if rows:
        connection.execute(insert(audit), rows)
    return last


def verify(record: Record, expected: str | None = None) -> Head:
    """Check every entry, and every decision and verdict against its entry; constant memory.

    Args:
        record: Of the station.
        expected: Hash of an entry that was noted elsewhere, which the chain must hold.

    Returns:
        The last entry.

    Raises:
        AuditError: An entry, a decision or a verdict was changed, added or removed.
    """
    last, counts, found = Head(0, START), {DECISION: 0, VERDICT: 0}, expected is None
    with record.read() as connection:
        while rows := connection.execute(
            select(audit).where(audit.c.sequence > last.sequence).order_by(audit.c.sequence).limit(CHUNK)
        ).all():
            for row in rows:
                entry = dict(row._mapping)
                digest = entry.pop("hash")
                if entry["sequence"] != last.sequence + 1:
                    raise AuditError(f"entry {last.sequence + 1} of the audit log is missing; the next one there is {entry['sequence']}")
                if digest != _link(last.hash, entry):
                    raise AuditError(f"entry {entry['sequence']} of the audit log was changed ({entry['kind']} {entry['subject']})")
                last = Head(entry["sequence"], digest)
                found = found or digest == expected
            _check_decisions(connection, [row for row in rows if row.kind == DECISION])
            _check_verdicts(connection, [row for row in rows if row.kind == VERDICT])
            for kind in counts:
                counts[kind] += sum(row.kind == kind for row in rows)
        for kind, table in ((DECISION, decisions), (VERDICT, verdicts)):
            there = connection.execute(select(func.count()).select_from(table)).scalar_one()
            if there != counts[kind]:
                raise AuditError(f"the record holds {there} {kind}s, the audit log {counts[kind]}: some were added without an entry")
    if not found:
        raise AuditError(f"no entry of the audit log has the hash {expected}: its end was cut off, or it was made anew")
    return last


def _link(previous: str, row: Mapping[str, Any]) -> str:
    return hashlib.sha256((previous + canonical(dict(row))).encode()).hexdigest()


def _check_decisions(connection: Connection, entries: list[Any]) -> None:
    for start in range(0, len(entries), 500):
        part = {entry.subject: json.loads(entry.content)["sha256"] for entry in entries[start : start + 500]}
        rows = connection.execute(select(decisions).where(decisions.c.id.in_(part))).all()
        held = {row.id: row_digest(dict(row._mapping)) for row in rows}
        for subject, digest in part.items():
            if held.get(subject) != digest:
                raise AuditError(f"decision {subject} {'was changed' if subject in held else 'is missing'}")


def _check_verdicts(connection: Connection, entries: list[Any]) -> None:
    for start in range(0, len(entries), 500):
        part = {entry.sequence: entry for entry in entries[start : start + 500]}
        rows = connection.execute(select(verdicts).where(verdicts.c.sequence.in_(part))).all()
        held = {row.sequence: (row.decision_id, row.who, {"verdict": row.verdict, "note": row.note}) for row in rows}
        for sequence, entry in part.items():
            if held.get(sequence) != (entry.subject, entry.who, json.loads(entry.content)):
                raise AuditError(f"the verdict of entry {sequence} on decision {entry.subject} was changed or is missing")
