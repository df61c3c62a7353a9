"""What vLLM's OpenAI server says of adapters that it cannot know: routes in place of its own.

vLLM loads this by the entry point ``vllm.endpoint_plugins`` if ``VLLM_PLUGINS`` names it. Requests
are checked and handed to vLLM's own routes. Loading under a name that is taken gives the name to
another adapter, and requests under way keep theirs.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from vllm import envs
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.api_router import models
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.lora.request import LoRARequest

from ept_fast.interchange.vllm import VLLMAdapter, read_vllm_sizes
from ept_fast.storage.untrusted import CheckpointError
from ept_fast.vllm.adapters import check_folder

__all__ = ["Endpoints"]


def _refusal(message: str) -> JSONResponse:
    return JSONResponse(create_error_response(message).model_dump(), status_code=400)


def _not_finite(value: Any, at: str = "") -> str | None:
    """Where a body has NaN or infinity, which JSON has no word for and Python's reader takes."""
    if isinstance(value, float):
        return None if math.isfinite(value) else at
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return next((w for key, v in items if (w := _not_finite(v, f"{at}.{key}"))), None)


@functools.cache
def _sizes(number: int, folder: str) -> VLLMAdapter:
    """Of an adapter, read once; one that is loaded anew has another number."""
    return read_vllm_sizes(folder)


async def _wrong(request: Any, raw_request: Request, render: Any) -> JSONResponse | None:
    """The answer to a request that cannot be served, by its adapter or at all; else None."""
    where = _not_finite(await raw_request.json())
    if where:
        return _refusal(f"{where.lstrip('.')}: expected a finite number, got NaN or infinity")
    serving = models(raw_request)
    named = serving.lora_requests.get(request.model)
    if named is None:
        return None
    if request.prompt_logprobs is not None or (request.echo and request.logprobs):
        return _refusal("prompt_logprobs: expected none, nor echo with logprobs, behind a prompt")
    rendered = await render(request.model_copy(deep=True))
    if isinstance(rendered, ErrorResponse):  # as vLLM's own route will find
        return None
    inputs = rendered[1] if isinstance(rendered, tuple) else rendered
    adapter = _sizes(named.lora_int_id, named.lora_path)
    most = adapter.longest_text(serving.model_config.max_model_len)
    longest = max((len(each["prompt_token_ids"]) for each in inputs), default=0)
    if longest > most:
        return _refusal(
            f"prompt: expected at most {most} tokens for the adapter {request.model!r}, "
            f"got {longest}"
        )
    return None


async def _complete(request: CompletionRequest, raw_request: Request) -> Any:
    handler = completion.completion(raw_request)
    wrong = await _wrong(request, raw_request, handler.online_renderer.render_completion)
    return wrong or await completion.create_completion(request, raw_request)


async def _chat(request: ChatCompletionRequest, raw_request: Request) -> Any:
    handler = chat.chat(raw_request)
    wrong = await _wrong(request, raw_request, handler.online_renderer.render_chat)
    return wrong or await chat.create_chat_completion(request, raw_request)


async def _load(request: LoadLoRAAdapterRequest, raw_request: Request) -> Response:
    """Load an adapter under a new name, or with ``load_inplace`` under one that is taken."""
    serving = models(raw_request)
    name, folder = request.lora_name, str(Path(request.lora_path).resolve())
    async with serving.lora_resolver_lock[name]:
        before = serving.lora_requests.get(name)
        if not name or serving.is_base_model(name):
            return _refusal(f"lora_name: expected a name that no model has, got {name!r}")
        if before is not None and not request.load_inplace:
            return _refusal(
                f"lora_name: expected a new one, or load_inplace to replace an adapter, "
                f"got {name!r}"
            )
        if before is not None and before.lora_path == folder:
            return _refusal(
                f"lora_path: expected another folder than that of {name!r} now, got {folder}"
            )
        client = serving.engine_client
        try:
            check_folder(folder, client.vllm_config)
        except (CheckpointError, OSError, TypeError, ValueError) as error:
            return _refusal(str(error))
        # A number of its own: requests under way keep the adapter that has the old one.
        loaded = LoRARequest(name, serving.lora_id_counter.inc(1), folder)
        await client.add_lora(loaded)
        serving.lora_requests[name] = loaded
    return Response(f"Success: adapter '{name}' {'added' if before is None else 'replaced'}.")


class Endpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "ept_fast"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Put the routes in place of vLLM's own."""
        router = APIRouter()
        body = [Depends(validate_json_request)]
        add: Any = router.add_api_route
        routes: dict[str, Any] = {"/v1/completions": _complete, "/v1/chat/completions": _chat}
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            routes["/v1/load_lora_adapter"] = _load
        for path, route in routes.items():
            add(path, route, methods=["POST"], dependencies=body)
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing: the routes ask vLLM's own state."""
