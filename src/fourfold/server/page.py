"""The page at `/` and its files: nothing but what lies in `static`, under a policy that lets nothing else run."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked about: the files change with the version, their names do not
}
OPEN_PATHS = frozenset({"/"})
STATIC = "/static/"


def page_router() -> APIRouter:
    """Routes to the files, which are read once: they are few and small."""
    router = APIRouter(include_in_schema=False)
    found = {
        entry.name: entry.read_bytes()
        for entry in files("fourfold.server").joinpath("static").iterdir()
        if entry.is_file() and _suffix(entry.name) in TYPES
    }

    @router.get("/")
    async def index() -> Response:
        return _reply("index.html", found["index.html"])

    @router.get(STATIC + "{name}")
    async def file(name: str) -> Response:
        if name not in found:
            raise HTTPException(404, "there is no such file")
        return _reply(name, found[name])

    return router


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]


def _reply(name: str, content: bytes) -> Response:
    return Response(content, headers={**HEADERS, "Content-Type": TYPES[_suffix(name)]})
