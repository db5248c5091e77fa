"""The endpoints around generation: models, token ids, health, version, metrics and the state of the server."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from steeple import __version__
from steeple.serve.errors import ApiError, wrong
from steeple.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from steeple.serve.schemas import DetokenizeRequest, TokenizeRequest
from steeple.serve.service import Service
from steeple.serve.stats import stats


def admin_routes(service: Service) -> APIRouter:
    """All of them."""
    router = APIRouter()
    _model_routes(router, service)
    _token_routes(router, service)
    _state_routes(router, service)
    return router


def _model_routes(router: APIRouter, service: Service) -> None:
    def card() -> dict[str, Any]:
        return {
            "id": service.config.name,
            "object": "model",
            "created": service.created,
            "owned_by": "steeple",
            "max_model_len": service.context,
        }

    @router.get("/v1/models", tags=["OpenAI"])
    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [card()]})

    @router.get("/v1/models/{model:path}", tags=["OpenAI"])
    async def model(model: str) -> Response:
        """One model by its name."""
        service.check_model(model)
        return JSONResponse(card())


def _token_routes(router: APIRouter, service: Service) -> None:
    @router.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or a conversation."""
        service.check_model(body.model)
        if body.messages is not None:
            tokens = await service.texts.chat(body.messages, prompt=body.add_generation_prompt)
        else:
            tokens = await service.texts.encode(body.prompt or "", special=body.add_special_tokens)
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}
        if body.return_token_strs:
            answer["token_strs"] = [service.texts.token_text(token) for token in tokens]
        return JSONResponse(answer)

    @router.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        if not body.tokens:
            raise wrong("tokens", "tokens is empty; give at least one.")
        return JSONResponse({"prompt": service.texts.decode(body.tokens)})


def _state_routes(router: APIRouter, service: Service) -> None:
    metrics = Metrics(service.loop, service.config.name, vllm=service.config.vllm_metrics)

    @router.get("/health", tags=["state"])
    async def health() -> Response:
        """Whether the engine's thread runs; 503 means that the server must be started again."""
        if not service.loop.alive:
            raise ApiError(503, f"not healthy: {service.loop.trouble or 'the engine does not run'}.", code="unhealthy")
        return JSONResponse({"status": "ok"})

    @router.get("/ready", tags=["state"])
    async def ready() -> Response:
        """Whether requests are taken; 503 while the server shuts down."""
        service.check_ready()
        return JSONResponse({"status": "ready"})

    @router.get("/version", tags=["state"])
    async def version() -> Response:
        """The version of Steeple."""
        return JSONResponse({"version": __version__})

    @router.get("/metrics", tags=["state"])
    async def show() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/stats", tags=["state"])
    async def state() -> Response:
        """What the server is doing, for people and pages."""
        return JSONResponse(stats(service))
