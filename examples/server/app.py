"""The HTTP side: routes, limits, and answers as a whole or piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from examples.server.batching import End, Refused, Ticket, Worker
from examples.server.body import BodyLimit
from examples.server.engine import Engine

__all__ = ["Ask", "create_app"]

_SHOWN = 64  # characters of a name in a request that an error repeats


def _text(value: str) -> str:
    """The value; JSON can write halves of characters too, and no tokenizer reads those."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("expected Unicode text, got half a surrogate pair") from None
    return value


class Ask(BaseModel):
    """The body of ``POST /generate``.

    Attributes:
        adapter: name of the task.
        text: what to answer.
        max_new_tokens: of the answer; where not given, as many as the server and the model take.
        stream: whether the answer comes piece by piece.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    adapter: Annotated[str, AfterValidator(_text)]
    text: Annotated[str, AfterValidator(_text)]
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False


def create_app(
    engine: Engine,
    worker: Worker,
    *,
    max_new_tokens: int = 128,
    max_body_bytes: int = 65536,
    grace: float | None = None,
) -> FastAPI:
    """The application; its lifespan starts the worker and waits for what that has taken.

    ``GET /health`` gives the worker's counts, with status 503 once the server is shutting down, and
    ``GET /adapters`` the tasks. ``POST /generate`` takes an :class:`Ask` and gives ``text``,
    ``finish_reason`` (``"stop"`` or ``"length"``), ``text_tokens`` and ``new_tokens``. A streamed
    answer is a line of JSON for each piece of text, and a last one with the rest of these; or with
    ``detail``, where it failed half-way.

    Errors are ``{"detail": ...}``: 404 for an unknown adapter, 413 for a body that is too large,
    422 for one that is no :class:`Ask` and for a text or an answer that is too long, 503 with
    Retry-After where the queue is full or the server is shutting down, 500 where a batch failed.

    Args:
        engine: the worker's.
        worker: not started yet.
        max_new_tokens: the longest answer.
        max_body_bytes: the largest body.
        grace: seconds to wait for the worker in the end; None for as long as it takes.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close, grace)

    app = FastAPI(title="EPT adapters", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"detail": _complaint(error)}, 422)

    @app.get("/health")
    async def health() -> Response:
        state, status = ("closing", 503) if worker.refusing else ("ok", 200)
        return JSONResponse({"status": state, **worker.counts()}, status)

    @app.get("/adapters")
    async def adapters() -> Response:
        tasks = [
            {"name": name, "bytes": task.bytes, "max_text_tokens": task.max_text_tokens}
            for name, task in engine.tasks.items()
        ]
        return JSONResponse({"adapters": tasks})

    @app.post("/generate")
    async def generate(ask: Ask, request: Request) -> Response:
        if ask.adapter not in engine.tasks:
            known, got = ", ".join(engine.tasks), ask.adapter[:_SHOWN]
            raise HTTPException(404, f"adapter: expected one of {known}, got {got!r}")
        try:
            ids = engine.encode(ask.adapter, ask.text)
            new = _new_tokens(ask.max_new_tokens, len(ids), max_new_tokens, engine.columns)
            events = _submit(worker, ask.adapter, ids, new, request)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        except Refused as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        first = await anext(events)  # waited for, so that a batch that fails at once is a 500
        if ask.stream and not (isinstance(first, End) and first.reason == "error"):
            lines = _lines(first, events, len(ids))
            return StreamingResponse(lines, media_type="application/x-ndjson")
        return await _whole(first, events, len(ids))

    return app


def _new_tokens(asked: int | None, text: int, most: int, columns: int | None) -> int:
    """The most new tokens of a request, whose text has ``text`` tokens."""
    room = most if columns is None else min(most, columns - text)
    if asked is not None and asked > room:
        raise ValueError(
            f"max_new_tokens: expected at most {room} after a text of {text} tokens, got {asked}"
        )
    return room if asked is None else asked


def _submit(
    worker: Worker, adapter: str, ids: list[int], new: int, request: Request
) -> AsyncGenerator[str | End, None]:
    """Put a ticket in the queue; its pieces and its end. Whoever leaves the loop cancels it."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str | End] = asyncio.Queue()

    def emit(event: str | End) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            loop.call_soon_threadsafe(queue.put_nowait, event)

    ticket = Ticket(adapter, ids, new, emit)

    async def cancel_when_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        worker.cancel(ticket)

    async def events() -> AsyncGenerator[str | End, None]:
        watch = asyncio.create_task(cancel_when_gone())
        try:
            while isinstance(event := await queue.get(), str):
                yield event
        finally:
            watch.cancel()
            worker.cancel(ticket)
        yield event

    worker.submit(ticket)
    return events()


async def _whole(
    first: str | End, events: AsyncGenerator[str | End, None], text_tokens: int
) -> Response:
    pieces, event = [], first
    while isinstance(event, str):
        pieces.append(event)
        event = await anext(events)
    status = {"error": 500, "cancelled": 499}.get(event.reason, 200)  # nobody sees a 499
    text = {"text": "".join(pieces)} if status == 200 else {}
    return JSONResponse({**text, **_summary(event, text_tokens)}, status)


async def _lines(
    first: str | End, events: AsyncGenerator[str | End, None], text_tokens: int
) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):
        event = first
        while isinstance(event, str):
            yield json.dumps({"text": event}) + "\n"
            event = await anext(events)
        yield json.dumps(_summary(event, text_tokens)) + "\n"


def _summary(end: End, text_tokens: int) -> dict[str, Any]:
    if end.reason == "error":
        return {"detail": f"{end.error} in the batch of this request"}
    return {
        "finish_reason": end.reason,
        "text_tokens": text_tokens,
        "new_tokens": end.new_tokens,
    }


def _complaint(error: RequestValidationError) -> str:
    """What is wrong with a body and where, without what it held."""
    first = error.errors()[0]
    fields = [part[:_SHOWN] for part in first["loc"][1:] if isinstance(part, str)]
    return f"{'.'.join(fields) or 'body'}: {first['msg']}"
