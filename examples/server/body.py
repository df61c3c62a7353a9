"""The limit on the size of requests."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BodyLimit"]


class BodyLimit:
    """Middleware that reads bodies up to a limit and answers larger ones with 413.

    A body without Content-Length is counted while it comes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's answer, or 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = int(Headers(scope=scope).get("content-length", 0))
        body = bytearray()
        more = True
        while more and max(declared, len(body)) <= self.max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if max(declared, len(body)) > self.max_bytes:
            detail = f"body: expected at most {self.max_bytes} bytes, got more"
            refusal = JSONResponse({"detail": detail}, 413, {"Connection": "close"})
            await refusal(scope, receive, send)
            return
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if not unread:
                return await receive()
            unread = False
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, send)
