"""What the REST interface says, as OpenAPI shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
FOLDER = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,63}){0,7}$"  # below data/
Text = Annotated[str, StringConstraints(max_length=2000)]


class Problem(BaseModel):
    """Why a request was refused."""

    model_config = ConfigDict(json_schema_extra={"example": {"detail": "there is no product 'gear'", "request_id": "0193b1c2d3e4"}})

    detail: str
    request_id: str


class RegionOut(BaseModel):
    """A connected area that looks anomalous, in pixels of the image."""

    box: Annotated[list[int], Field(description="left, top, right, bottom; right and bottom lie outside")]
    area: int
    peak: Annotated[float, Field(description="highest value of the map in it; above 1 is anomalous")]
    contour: Annotated[list[list[int]], Field(description="corners [x, y] of its outline")]


class Links(BaseModel):
    """Where the pictures are."""

    image: str
    map: str
    overlay: str
    reconstruction: str


class DecisionOut(BaseModel):
    """A decision, which is in the record."""

    id: str
    time: str
    product: str
    version: int
    model_id: str
    calibration_id: str
    source: str
    request_id: str
    image_name: str
    image_sha256: str
    width: int
    height: int
    score: Annotated[float, Field(description="in units of the model's threshold")]
    warn_limit: float | None
    reject_limit: float
    p_value: Annotated[float, Field(description="share of held-out good parts that score at least as high")]
    decision: Literal["accept", "warn", "reject"]
    step: Annotated[int, Field(description="diffusion timestep chosen for this image")]
    regions: list[RegionOut]
    brightness: Annotated[float, Field(description="mean level, in [0, 1]")]
    sharpness: float
    promise_suspended: Annotated[bool, Field(description="the promise about false rejects did not hold when this was decided")]
    milliseconds: Annotated[float, Field(description="of the inspection itself")]
    verdict: Literal["good", "bad"] | None = None
    links: Links


def shown(row: dict[str, Any]) -> DecisionOut:
    """A row of the record as it is answered."""
    base = f"/v1/decisions/{row['id']}"
    links = {
        "image": f"{base}/image",
        "map": f"{base}/map.png",
        "overlay": f"{base}/overlay.png",
        "reconstruction": f"{base}/reconstruction.png",
    }
    return DecisionOut.model_validate(row | {"links": links})


class BatchItem(BaseModel):
    """What became of one of several images: a decision, or a problem."""

    image_name: str
    status: Annotated[int, Field(description="what an image sent alone would have been answered")]
    decision: DecisionOut | None = None
    problem: str | None = None


class Batch(BaseModel):
    """What became of several images, in their order."""

    items: list[BatchItem]


class Page(BaseModel):
    """Decisions, the newest first."""

    items: list[DecisionOut]
    next: Annotated[str | None, Field(description="give it as `before` for the next page; null at the end")]


class VerdictIn(BaseModel):
    """What a person says of a part."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"verdict": "good", "note": "a reflection"}})

    verdict: Literal["good", "bad"]
    note: Text = ""


class DriftOut(BaseModel):
    """A drift test of the active version."""

    alarm: bool
    evidence: Annotated[float, Field(description="the alarm is raised at 1")]
    direction: Literal["up", "down"]
    parts: Annotated[int, Field(description="accepted parts seen since the version was activated")]
    learning: Annotated[int, Field(description="parts that it will still learn from before it begins")]


class ProductOut(BaseModel):
    """A product."""

    name: str
    active: Annotated[int | None, Field(description="number of the version that inspects")]
    stopped: Annotated[str | None, Field(description="why it does not inspect")]
    suspended: Annotated[str | None, Field(description="why the promise about false rejects does not hold")]
    drift: Annotated[dict[str, DriftOut], Field(description="of the scores, the brightness and the sharpness of accepted parts")]
    counts: dict[str, int]
    judged: Annotated[dict[str, int], Field(description="how many parts people called good and bad, by their last verdicts")]


class VersionOut(BaseModel):
    """A version of a product."""

    product: str
    number: int
    model_id: str
    calibration_id: str
    digest: str
    warn_limit: float | None
    reject_limit: float
    created: str
    who: str
    note: str
    active: bool
    promise: Annotated[str, Field(description="what its threshold promises")]


class ActivateIn(BaseModel):
    """Which version shall inspect."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"version": 2}})

    version: Annotated[int, Field(ge=1, le=2**31 - 1)]
    force: bool = False


class GoldenOut(BaseModel):
    """A golden part."""

    product: str
    version: int
    image_sha256: str
    image_name: str
    score: float
    decision: str


class Checked(BaseModel):
    """The outcome of a check of the golden parts."""

    golden_parts: int
    stopped: str | None


class FitIn(BaseModel):
    """What may be chosen about a fit; what is left out has its default."""

    model_config = ConfigDict(extra="forbid")

    false_reject_rate: Annotated[float | None, Field(gt=0, le=0.5)] = None
    image_size: Annotated[int | None, Field(ge=32, le=4096, description="side in pixels to work at")] = None
    tiles: Annotated[int | None, Field(ge=1, le=8)] = None
    align: bool | None = None
    tolerate: list[Literal["light", "noise", "focus", "compression", "shift"]] | None = None
    max_images: Annotated[int | None, Field(ge=1, le=100_000)] = None
    shots: Annotated[int | None, Field(ge=1, le=64)] = None
    minutes: Annotated[float | None, Field(gt=0, le=1440, description="time budget of the training")] = None
    steps: Annotated[int | None, Field(ge=1, le=1_000_000, description="of the training")] = None
    seed: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None

    def values(self) -> dict[str, Any]:
        """By the names of the settings."""
        long = {"minutes": "training.minutes", "steps": "training.steps"}
        return {long.get(name, name): value for name, value in self.model_dump(exclude_none=True).items()}


class JobIn(BaseModel):
    """Long work."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"kind": "fit", "product": "gear", "images": "gear/good", "settings": {"false_reject_rate": 0.02}}},
    )

    kind: Annotated[
        Literal["fit", "calibrate", "evaluate", "feedback", "inspect"],
        Field(
            description="fit and calibrate make a version; evaluate measures the active one on labelled images; feedback makes a version "
            "of the images and of the parts that were called good; inspect decides a folder"
        ),
    ]
    product: Name
    images: Annotated[
        str,
        StringConstraints(pattern=FOLDER),
        Field(description="folder below the station's data/"),
    ]
    base: Annotated[Literal["lite", "memory-bank", "padim", "pca"], Field(description="of a fit")] = "lite"
    settings: Annotated[FitIn, Field(description="of a fit")] = FitIn()
    ignore: Annotated[
        str | None,
        StringConstraints(pattern=FOLDER),
        Field(description="of a calibration: mask below data/, white where nothing counts; what is left out stays as it is"),
    ] = None
    min_area: Annotated[float | None, Field(ge=0, lt=1, description="of a calibration: smaller areas do not count; share of the image")] = (
        None
    )
    mode: Annotated[
        Literal["calibrate", "continue", "fit"],
        Field(description="of feedback: new thresholds; training on from the present weights, replaying what was learnt before; a new fit"),
    ] = "calibrate"
    activate: Annotated[
        bool | None, Field(description="have the new version inspect if it decides the golden parts alike; yes, but for feedback")
    ] = None
    note: Text = ""


class ExampleOut(BaseModel):
    """A picture that a training has shown: ``/v1/jobs/ID/examples/NAME.png``."""

    name: str
    stage: str
    step: int


class ProgressOut(BaseModel):
    """How far a job is."""

    stage: str
    done: int
    total: int
    losses: Annotated[
        dict[str, list[tuple[int, float]]], Field(description="of a training: stage -> steps and mean losses up to them, at most 120")
    ] = {}
    examples: Annotated[list[ExampleOut], Field(description="pictures that a training has shown, kept until the job is done")] = []


class JobOut(BaseModel):
    """A job."""

    id: str
    created: str
    who: str
    kind: str
    product: str
    request: dict[str, Any]
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    progress: ProgressOut | None
    result: dict[str, Any] | None
    problem: str | None


class DataFolder(BaseModel):
    """A folder of images."""

    name: str
    images: int


class FindingOut(BaseModel):
    """Something about a folder that is worth knowing."""

    text: str
    serious: Annotated[bool, Field(description="results would be wrong or missing")]
    files: list[str]
    remarks: list[str]


class FolderCheck(BaseModel):
    """What is in a folder."""

    layout: str
    sound: Annotated[bool, Field(description="nothing serious was found")]
    counts: list[dict[str, Any]]
    sizes: dict[str, dict[str, int]]
    findings: list[FindingOut]
    notes: list[str]


class CalibrationOut(BaseModel):
    """What the thresholds of a version were made from."""

    scores: Annotated[list[float], Field(description="of held-out good images, rising, in units of the threshold")]
    images: Annotated[int, Field(description="number of held-out good images")]
    false_reject_rate: Annotated[float, Field(description="asked for")]
    promised_rate: float
    needed: Annotated[int, Field(description="held-out images from which on the rate asked for can be promised")]
    method: Annotated[str, Field(description='"conformal", "cross-fitted" or "copies"')]
    statement: str
    min_area: Annotated[float, Field(description="share of the image below which areas do not count")]
    masked: Annotated[bool, Field(description="some of the image does not count")]
    aligned: Annotated[
        bool, Field(description="parts are turned and moved first, so that no place or small area can be left out of account")
    ]
    good_parts: Annotated[bool, Field(description="small pictures of good parts are kept, to be shown beside others")]


class LimitsIn(BaseModel):
    """A version with the model of another one."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"model_of": 1, "warn_limit": 0.8, "reject_limit": 1.1}})

    model_of: Annotated[int, Field(ge=1, le=2**31 - 1, description="number of the version whose model it has")]
    warn_limit: Annotated[float | None, Field(gt=0, le=1e6)] = None
    reject_limit: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    note: Text = ""


class ScoreOut(BaseModel):
    """The score of a decision."""

    id: str
    version: Annotated[int, Field(description="that gave it; another model's scores mean something else")]
    score: float
    decision: Literal["accept", "warn", "reject"]
    verdict: Literal["good", "bad"] | None


class Period(BaseModel):
    """What was decided in a period."""

    since: str
    until: str
    accept: int
    warn: int
    reject: int


class EntryOut(BaseModel):
    """An entry of the audit log."""

    sequence: int
    time: str
    who: str
    kind: str
    content: dict[str, Any]
    hash: str


class HeadOut(BaseModel):
    """The last entry of the audit log: note its hash elsewhere now and then."""

    sequence: int
    hash: str


Responses = dict[int | str, dict[str, Any]]


def problems(*codes: int) -> Responses:
    """Documentation of refusals."""
    return {code: {"model": Problem, "description": _MEANING[code]} for code in codes}


_MEANING = {
    400: "The request cannot be understood",
    401: "The API key is missing or wrong",
    404: "There is nothing of this name",
    408: "The body took too long",
    409: "The product does not inspect now",
    413: "The body is too large",
    415: "Not an image, or not what its content type says",
    422: "The image or a value is refused",
    429: "Too many images wait: send it again after Retry-After seconds",
    503: "Not ready, or the inspection process failed",
    504: "Not done within the deadline",
    507: "The disk or the database is full or read-only; nothing was kept",
}
