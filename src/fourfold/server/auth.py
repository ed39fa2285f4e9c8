"""Who may ask: API keys, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from fourfold.errors import UserError
from fourfold.server.errors import ApiError
from fourfold.server.replies import send_error

VARIABLE = "FOURFOLD_API_KEY"
LEAST_CHARS = 16
OPEN_PATHS = ("/health", "/ready")  # for those who watch over the server


def route_path(scope: Scope) -> str:
    """The path by which the application finds a route: without the part below which a proxy mounts it."""
    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and (path == root or path.startswith(root + "/")) else path


class Keys:
    """The keys that are accepted; none: everybody is."""

    def __init__(self, keys: list[str]) -> None:
        """Raises UserError for a key that could be guessed, or that no header can carry."""
        for key in keys:
            if len(key) < LEAST_CHARS or not key.isascii() or not key.isprintable() or " " in key:
                raise UserError(
                    f"an API key must have at least {LEAST_CHARS} printable ASCII characters and no space; "
                    "make one with `openssl rand -hex 32`"
                )
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def load(cls, file: Path | None) -> Keys:
        """Of a file, one a line, lines with # in front left out, and of FOURFOLD_API_KEY."""
        keys = [os.environ[VARIABLE]] if os.environ.get(VARIABLE) else []
        if file is not None:
            try:
                lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except UnicodeDecodeError:
                raise UserError(f"{file} is not text; write one key a line") from None
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise UserError(f"{file} has no key in it; write one a line")
            keys += found
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, header: str) -> bool:
        """Whether an Authorization header carries one of them; takes as long for a wrong key as for a right one."""
        scheme, _, key = header.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return scheme.lower() == "bearer" and any(matches)


class Auth:
    """Refuses requests without a key, before their bodies are read."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: frozenset[str], open_prefix: str) -> None:
        self._app, self._keys, self._open, self._prefix = app, keys, open_paths, open_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        is_open = path in self._open or path.startswith(self._prefix)
        if scope["type"] == "http" and self._keys and not is_open:
            header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            if not self._keys.accept(header):
                wrong = "and this is none of its own" if header else "sent as `Authorization: Bearer KEY`"
                message = f"this server needs an API key, {wrong}"
                refusal = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await send_error(scope, receive, send, refusal)
                return
        await self._app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
