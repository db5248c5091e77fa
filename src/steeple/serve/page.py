"""The live page at ``/``: one HTML file, style and scripts inside, under a policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from steeple.serve.service import Service

STYLE = "page.css"
SCRIPTS = ("api.js", "draw.js", "numbers.js", "timeline.js", "tokens.js", "chat.js")
"""Files of ``page/`` that stand in ``index.html``, each at the mark ``@NAME@``."""


def add_page(app: FastAPI, service: Service) -> None:
    """Register ``/``. The page asks the server's own endpoints for everything that changes."""
    html, headers = build(_facts(service))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)


def build(facts: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """The page and the headers that go with it.

    Args: facts: what the page is to know before it asks, in JSON types.
    """
    folder = files("steeple.serve") / "page"
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in (STYLE, *SCRIPTS)}
    # Within a script element neither "</script" nor "<!--" may be written as they are.
    parts["facts"] = json.dumps(facts).replace("<", "\\u003c")
    text = (folder / "index.html").read_text(encoding="utf-8")
    text = re.sub("@([a-z_.]+)@", lambda found: parts[found[1]], text)  # once, so that no part's text is a mark
    headers = {
        "Content-Security-Policy": _policy(_digest(parts[STYLE]), [_digest(parts[name]) for name in SCRIPTS]),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text.encode(), headers


def _facts(service: Service) -> dict[str, Any]:
    """What does not change while the server runs, and is no secret."""
    nodes = service.loop.nodes
    return {
        "model": service.config.name,
        "drafter": service.config.drafter_name if nodes else service.no_drafter,
        "plain": service.no_drafter,
        "nodes": nodes,
        "context": service.context,
    }


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(style: str, scripts: list[str]) -> str:
    """Only these scripts and this style; requests to this server alone; no text may become markup."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(scripts)}",
            f"style-src {style}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
