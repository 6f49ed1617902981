"""Products, their versions and golden parts, and the audit log."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import Connection

from gladad.core.images import as_pixels
from gladad.core.storage import read_model_file
from gladad.detector.files import ALIGNMENT_FILE, MASK_FILE
from gladad.report.pictures import thumbnail, to_png
from gladad.service import audit, decisions, golden, good_parts
from gladad.service.access import Running, Who
from gladad.service.intake import check_filename
from gladad.service.line import Line
from gladad.service.products import (
    Product,
    Version,
    active_version,
    add_version,
    all_products,
    all_versions,
    calibration_of,
    folder_of,
    product_of,
    stop,
    version_of,
)
from gladad.service.routes_decisions import IMAGE_BODY, PNG, SMALL, refuse_early
from gladad.service.schemas import (
    ActivateIn,
    CalibrationOut,
    Checked,
    GoldenOut,
    HeadOut,
    LimitsIn,
    Period,
    ProductOut,
    ScoreOut,
    VersionOut,
    problems,
)
from gladad.service.station import UnknownError

router = APIRouter(prefix="/v1", tags=["products"])
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.get("/products", responses=problems(401))
def products(who: Who, line: Running) -> list[ProductOut]:
    """All products."""
    with line.station.record.read() as connection:
        return [_product(connection, each) for each in all_products(connection)]


@router.get("/products/{product}", responses=problems(401, 404))
def one_product(product: str, who: Who, line: Running) -> ProductOut:
    """One product."""
    with line.station.record.read() as connection:
        return _product(connection, product_of(connection, product))


@router.get("/products/{product}/versions", responses=problems(401, 404))
def product_versions(product: str, who: Who, line: Running) -> list[VersionOut]:
    """Its versions, the oldest first; they are never changed."""
    with line.station.record.read() as connection:
        active = product_of(connection, product).active
        return [_shown(line, version, active) for version in all_versions(connection, product)]


@router.post("/products/{product}/versions", status_code=201, responses=problems(400, 401, 404, 422, 507))
def add_limits(product: str, body: LimitsIn, who: Who, line: Running) -> VersionOut:
    """Make a version with the model of another one and other limits. It is not activated."""
    with line.station.record.read() as connection:
        known, active = version_of(connection, product, body.model_of), product_of(connection, product).active
    model = folder_of(line.station, product, known.number)
    made = add_version(line.station, product, model, who, note=body.note, warn_limit=body.warn_limit, reject_limit=body.reject_limit)
    return _shown(line, made, active)


@router.get("/products/{product}/versions/{number}/calibration", responses=problems(401, 404, 422))
def calibration(product: str, number: Number, who: Who, line: Running) -> CalibrationOut:
    """What the thresholds of a version were made from."""
    with line.station.record.read() as connection:
        version_of(connection, product, number)
    folder = folder_of(line.station, product, number)
    found, scope = calibration_of(folder), read_model_file(folder).get("scope") or {}
    return CalibrationOut(
        scores=[score / found.threshold.value for score in found.scores],
        images=found.threshold.n,
        false_reject_rate=found.threshold.false_reject_rate,
        promised_rate=found.threshold.promised_rate,
        needed=found.threshold.needed,
        method=found.threshold.method,
        statement=found.threshold.statement,
        min_area=scope.get("min_area", 0.0),
        masked=scope.get("mask", False),
        aligned=(folder / ALIGNMENT_FILE).is_file(),
        good_parts=good_parts.has(folder),
    )


@router.get("/products/{product}/versions/{number}/ignored.png", **PNG)
def ignored_picture(product: str, number: Number, who: Who, line: Running) -> Response:
    """The mask of a version: white where nothing counts. There is none where everything counts."""
    with line.station.record.read() as connection:
        version_of(connection, product, number)
    path = folder_of(line.station, product, number) / MASK_FILE
    if not path.is_file():
        raise UnknownError(f"version {number} of {product!r} ignores no place")
    return Response(path.read_bytes(), media_type="image/png")


@router.get("/products/{product}/scores", responses=problems(401, 404, 422))
def scores(product: str, who: Who, line: Running, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> list[ScoreOut]:
    """Scores and verdicts of the last decisions, the newest first."""
    with line.station.record.read() as connection:
        product_of(connection, product)
        return [ScoreOut.model_validate(row) for row in decisions.scores(connection, product, limit)]


@router.get("/products/{product}/periods", responses=problems(401, 404, 422))
def periods(
    product: str,
    who: Who,
    line: Running,
    days: Annotated[float, Query(gt=0, le=3660, description="up to now")] = 1.0,
    count: Annotated[int, Query(ge=1, le=200)] = 48,
) -> list[Period]:
    """What was decided in so many equal periods up to now."""
    until = datetime.now(UTC)
    with line.station.record.read() as connection:
        product_of(connection, product)
        return [Period.model_validate(row) for row in decisions.periods(connection, product, until - timedelta(days=days), until, count)]


@router.put("/products/{product}/active", responses=problems(400, 401, 404, 422, 429, 503, 507))
async def activate(product: str, body: ActivateIn, who: Who, line: Running) -> VersionOut:
    """Load and check a version, then have it inspect. What is under way is finished by the one before; a stop ends."""
    version = await asyncio.to_thread(line.activate, product, body.version, who, force=body.force)
    return _shown(line, version, version.number)


@router.put("/products/{product}/stop", responses=problems(401, 404, 422, 507))
def stop_product(
    product: str, who: Who, line: Running, reason: Annotated[str, Query(min_length=1, max_length=500)] = "stopped by an operator"
) -> ProductOut:
    """Have a product refuse images until a version is activated."""
    stop(line.station, product, reason, who)
    line.forget(product)
    return one_product(product, who, line)


@router.get("/products/{product}/golden", responses=problems(401, 404, 409))
def golden_parts(product: str, who: Who, line: Running) -> list[GoldenOut]:
    """The golden parts of the active version."""
    with line.station.record.read() as connection:
        version = active_version(connection, product)
        return [GoldenOut.model_validate(row) for row in golden.of(connection, product, version.number)]


@router.post(
    "/products/{product}/golden", responses=problems(400, 401, 404, 408, 409, 413, 415, 422, 429, 503, 507), openapi_extra=IMAGE_BODY
)
async def add_golden(
    request: Request, product: str, who: Who, line: Running, name: Annotated[str, Query(max_length=255)] = ""
) -> GoldenOut:
    """Keep an image, and what the active version says of it, as a golden part. It is inspected again whenever the service starts."""
    await refuse_early(request, line)
    content = await request.body()
    return GoldenOut.model_validate(await asyncio.to_thread(line.add_golden, product, content, check_filename(name), who))


@router.get("/products/{product}/golden/{sha256}/small.png", **PNG | {"responses": PNG["responses"] | problems(409)})
def golden_picture(product: str, sha256: str, who: Who, line: Running) -> Response:
    """A golden part of the active version, small."""
    with line.station.record.read() as connection:
        rows = golden.of(connection, product, active_version(connection, product).number)
    paths = [golden.path_of(line.station, row) for row in rows if row["image_sha256"] == sha256]
    if not paths or not paths[0].is_file():
        raise UnknownError(f"product {product!r} has no golden part {sha256!r}")
    return Response(to_png(thumbnail(as_pixels(paths[0].read_bytes()), SMALL)), media_type="image/png")


@router.post("/products/{product}/golden/check", responses=problems(401, 404, 409, 429, 503, 507))
async def check_golden(product: str, who: Who, line: Running) -> Checked:
    """Inspect the golden parts of the active version again; the product is stopped if one scores otherwise than it did."""
    return await asyncio.to_thread(_check, line, product)


@router.get("/audit/head", tags=["audit"], responses=problems(401))
def audit_head(who: Who, line: Running) -> HeadOut:
    """The last entry of the audit log. Noted elsewhere, its hash proves later that nothing before was changed."""
    with line.station.record.read() as connection:
        return HeadOut(**vars(audit.head(connection)))


def _check(line: Line, product: str) -> Checked:
    version = line.active(product)
    line.check(version)
    with line.station.record.read() as connection:
        count = len(golden.of(connection, product, version.number))
        return Checked(golden_parts=count, stopped=product_of(connection, product).stopped)


def _shown(line: Line, version: Version, active: int | None) -> VersionOut:
    promise = calibration_of(folder_of(line.station, version.product, version.number)).threshold.statement
    if version.reject_limit < 1:
        promise = "none: the reject limit is below the model's threshold"
    return VersionOut(**version.to_json(), active=version.number == active, promise=promise)


def _product(connection: Connection, found: Product) -> ProductOut:
    return ProductOut(**vars(found), counts=decisions.counts(connection, found.name), judged=decisions.judged(connection, found.name))
