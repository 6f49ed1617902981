"""Long work, and its progress."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from gladad.service.access import Who
from gladad.service.jobs import FINAL, POLL_SECONDS, Jobs
from gladad.service.schemas import JobIn, JobOut, problems

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


def jobs_of(request: Request) -> Jobs:
    """The running jobs."""
    jobs: Jobs = request.app.state.jobs
    return jobs


Running = Annotated[Jobs, Depends(jobs_of)]


@router.post("", status_code=202, responses=problems(400, 401, 404, 409, 422, 507))
def add(body: JobIn, who: Who, jobs: Running) -> JobOut:
    """Queue a job; one is done at a time. It outlives a restart of the service."""
    request: dict[str, Any] = {"images": body.images, "note": body.note}
    if body.kind in ("fit", "calibrate", "feedback"):
        request |= {"activate": body.kind != "feedback" if body.activate is None else body.activate}
    if body.kind == "feedback":
        request |= {"mode": body.mode}
    if body.kind == "calibrate":
        request |= {"ignore": body.ignore, "min_area": body.min_area}
    if body.kind == "fit":
        request |= {"base": body.base, "settings": body.settings.values()}
    return JobOut.model_validate(jobs.add(body.kind, body.product, who, request))


@router.get("", responses=problems(401, 422))
def all_jobs(who: Who, jobs: Running, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[JobOut]:
    """Jobs, the newest first."""
    return [JobOut.model_validate(job) for job in jobs.all(limit)]


@router.get("/{identity}", responses=problems(401, 404))
def one(identity: str, who: Who, jobs: Running) -> JobOut:
    """One job."""
    return JobOut.model_validate(jobs.one(identity))


@router.delete("/{identity}", responses=problems(401, 404, 507))
def cancel(identity: str, who: Who, jobs: Running) -> JobOut:
    """Stop a job; what it has decided so far stays in the record. Nothing happens to one that is finished."""
    return JobOut.model_validate(jobs.cancel(identity, who))


@router.get(
    "/{identity}/examples/{name}.png",
    responses={200: {"content": {"image/png": {}}}, **problems(401, 404, 422)},
    response_class=Response,
)
def example(identity: str, name: Annotated[str, Path(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")], who: Who, jobs: Running) -> Response:
    """A picture that a training has shown: an input beside what the model made of it so far."""
    return Response(jobs.example(identity, name), media_type="image/png", headers={"cache-control": "no-store"})


@router.get(
    "/{identity}/events", responses={200: {"content": {"text/event-stream": {}}}, **problems(401, 404)}, response_class=StreamingResponse
)
async def events(identity: str, who: Who, jobs: Running) -> StreamingResponse:
    """The job whenever it changes, as server-sent events; the last one is its end."""
    await asyncio.to_thread(jobs.one, identity)

    async def changes() -> AsyncIterator[str]:
        last = None
        while True:
            job = JobOut.model_validate(await asyncio.to_thread(jobs.one, identity)).model_dump(mode="json")
            if job != last:
                last = job
                yield f"event: job\ndata: {json.dumps(job)}\n\n"
            if job["state"] in FINAL:
                return
            await asyncio.sleep(POLL_SECONDS)

    return StreamingResponse(changes(), media_type="text/event-stream", headers={"cache-control": "no-store"})
