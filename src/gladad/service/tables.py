"""Tables of the record. Rows of ``decisions``, ``verdicts``, ``versions`` and ``audit`` are written once and never changed."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Float, ForeignKeyConstraint, Index, Integer, MetaData, String, Table, Text

metadata = MetaData(
    naming_convention={"pk": "pk_%(table_name)s", "fk": "fk_%(table_name)s_%(column_0_name)s", "ix": "ix_%(table_name)s_%(column_0_name)s"}
)

products = Table(
    "products",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("active", Integer),  # number of the version that inspects; null: none
    Column("stopped", Text),  # why it does not inspect now; null: it does
    Column("drift", JSON),  # states of the drift tests of the active version: of scores, brightness and sharpness
    Column("suspended", Text),  # why the promise about false rejects does not hold now; null: it does
)

versions = Table(
    "versions",
    metadata,
    Column("product", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("model_id", String(64), nullable=False),
    Column("calibration_id", String(64), nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the files of the model folder
    Column("warn_limit", Float),  # a higher score is a warning; null: there are no warnings
    Column("reject_limit", Float, nullable=False),  # a higher score is rejected; 1 is the model's own threshold
    Column("created", String(32), nullable=False),
    Column("who", String(64), nullable=False),
    Column("note", Text, nullable=False),
    ForeignKeyConstraint(["product"], ["products.name"]),
)

decisions = Table(
    "decisions",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("time", String(32), nullable=False),  # ISO 8601, UTC, microseconds
    Column("product", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("model_id", String(64), nullable=False),
    Column("calibration_id", String(64), nullable=False),
    Column("source", String(16), nullable=False),  # "rest", "job" or "watch"
    Column("request_id", String(64), nullable=False),
    Column("image_name", Text, nullable=False),
    Column("image_sha256", String(64), nullable=False),
    Column("image_type", String(8), nullable=False),  # ending of its file
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("score", Float, nullable=False),  # in units of the model's threshold
    Column("warn_limit", Float),
    Column("reject_limit", Float, nullable=False),
    Column("p_value", Float, nullable=False),
    Column("decision", String(8), nullable=False),  # "accept", "warn" or "reject"
    Column("step", Integer, nullable=False),
    Column("regions", JSON, nullable=False),
    Column("brightness", Float, nullable=False),
    Column("sharpness", Float, nullable=False),
    Column("promise_suspended", Boolean, nullable=False),
    Column("milliseconds", Float, nullable=False),  # of the inspection itself
    ForeignKeyConstraint(["product", "version"], ["versions.product", "versions.number"]),
    Index("ix_decisions_product", "product", "id"),  # IDs begin with their time
    Index("ix_decisions_decision", "product", "decision", "id"),
    Index("ix_decisions_request", "request_id"),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),  # of its audit entry
    Column("decision_id", String(32), nullable=False),
    Column("time", String(32), nullable=False),
    Column("who", String(64), nullable=False),
    Column("verdict", String(8), nullable=False),  # "good" or "bad"
    Column("note", Text, nullable=False),
    ForeignKeyConstraint(["decision_id"], ["decisions.id"]),
    Index("ix_verdicts_decision", "decision_id", "sequence"),
)

goldens = Table(
    "goldens",
    metadata,
    Column("product", String(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("image_sha256", String(64), primary_key=True),
    Column("image_name", Text, nullable=False),
    Column("image_type", String(8), nullable=False),
    Column("score", Float, nullable=False),
    Column("decision", String(8), nullable=False),
    ForeignKeyConstraint(["product", "version"], ["versions.product", "versions.number"]),
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),  # from 1, without gaps
    Column("time", String(32), nullable=False),
    Column("who", String(64), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("subject", String(160), nullable=False),
    Column("content", Text, nullable=False),  # JSON
    Column("hash", String(64), nullable=False),
    Index("ix_audit_subject", "subject"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("created", String(32), nullable=False),
    Column("who", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("product", String(64), nullable=False),
    Column("request", JSON, nullable=False),
    Column("state", String(16), nullable=False),  # "waiting", "running", "done", "failed" or "cancelled"
    Column("progress", JSON),  # stage, done, total
    Column("result", JSON),
    Column("problem", Text),
    Index("ix_jobs_state", "state"),
)

watched = Table(
    "watched",
    metadata,
    Column("folder", Text, primary_key=True),
    Column("file", String(128), primary_key=True),  # its number, size and time: a rename keeps them
    Column("decision_id", String(32)),  # null: refused
    Column("name", Text, nullable=False),
    Column("problem", Text),
    Column("moved", Boolean, nullable=False),  # to where its decision says, or it stays where it is
)

outbox = Table(
    "outbox",
    metadata,
    Column("key", String(80), primary_key=True),  # idempotency key: output and decision
    Column("output", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("due", Float, nullable=False),  # seconds since the epoch
    Column("attempts", Integer, nullable=False),
    Column("problem", Text),
    Index("ix_outbox_due", "due"),
)
