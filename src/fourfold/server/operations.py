"""Routes for those who run the server: the model list, liveness, readiness, metrics, and the page's figures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from fourfold.server.errors import unavailable
from fourfold.server.replies import JsonReply
from fourfold.server.responses import Model, ModelList
from fourfold.server.service import Service, service_of

router = APIRouter()


class State(BaseModel):
    status: str  # ok, starting, draining or failed
    reason: str | None = None  # in a sentence, where it is not ok


@router.get("/v1/models", response_model=ModelList)
async def list_models(http: HttpRequest) -> Response:
    """The one model."""
    return JsonReply(ModelList(object="list", data=[_model(service_of(http))]))


@router.get("/v1/models/{model:path}", response_model=Model)
async def retrieve_model(model: str, http: HttpRequest) -> Response:
    """It, by its name."""
    service = service_of(http)
    service.check_model(model)
    return JsonReply(_model(service))


@router.get("/health", response_model=State, responses={503: {"model": State}})
async def health(http: HttpRequest) -> Response:
    """Liveness: 200 as long as restarting the process would not help."""
    failure = service_of(http).worker.failure
    return JSONResponse(
        {"status": "failed", "reason": failure} if failure else {"status": "ok"}, 503 if failure else 200
    )


@router.get("/ready", response_model=State, responses={503: {"model": State}})
async def ready(http: HttpRequest) -> Response:
    """Readiness: 200 from the end of the warm-up until the server begins to end."""
    closed = service_of(http).closed
    if closed is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": closed.status, "reason": closed.reason}, 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(http: HttpRequest) -> Response:
    """For Prometheus."""
    return Response(service_of(http).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/stats")
async def stats(http: HttpRequest) -> dict[str, Any]:
    """What the server does at this moment: speeds of the last seconds, counters since its start."""
    service = service_of(http)
    facts = {name: service.facts.get(name) for name in ("format", "kv", "isa", "ranks", "threads", "weight_bytes")}
    return {"model": service.name, "context": service.context, **facts, **service.metrics.snapshot()}


def check_open(service: Service) -> None:
    """Raises a 503 where no requests are taken."""
    if service.closed is not None:
        raise unavailable(f"{service.closed.reason}; try again later")


def _model(service: Service) -> Model:
    return Model(id=service.name, object="model", created=service.created, owned_by="fourfold")
