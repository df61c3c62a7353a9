"""vLLM's schedulers with room for a prompt before the text of a request that names an adapter."""

from __future__ import annotations

from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from ept_fast.interchange.vllm import VLLMAdapter, read_vllm_sizes
from ept_fast.storage.untrusted import CheckpointError
from ept_fast.vllm import check_version

__all__ = ["scheduler"]

check_version()


class _Prompted:
    """What stands before a scheduler class in its subclass.

    The client sent the text; the engine reads m more tokens before it. Which tokens these are makes
    no difference, as the model puts the rows of P′ at their positions; what tells the blocks of one
    adapter from those of another is the salt that their hashes begin with.
    """

    requests: dict[str, Any]
    max_model_len: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapters: dict[tuple[int, str], VLLMAdapter] = {}
        self._refused: list[tuple[Request, str]] = []
        own: Any = self
        first = own.vllm_config.model_config.hf_config.get_text_config()
        bos = getattr(first, "bos_token_id", None)
        # Penalties count it as read; the token that begins a text is one that no text repeats.
        self._token = bos if isinstance(bos, int) else 0

    def add_request(self, request: Request) -> None:
        if request.lora_request is not None and request.request_id not in self.requests:
            wrong = self._put_prompt_before(request)
            if wrong:
                self._refused.append((request, wrong))
                return
        above: Any = super()
        above.add_request(request)

    def _put_prompt_before(self, request: Request) -> str:
        """Make room for the prompt; else say what the request has that it cannot have."""
        params, text = request.sampling_params, request.prompt_token_ids
        if text is None or params is None or request.resumable:
            return "prompt: expected text to be continued, got something else"
        if params.prompt_logprobs is not None:
            return f"prompt_logprobs: expected None behind a prompt, got {params.prompt_logprobs}"
        try:
            adapter = self._adapter(request.lora_request)
        except (CheckpointError, OSError) as error:
            return str(error)
        named = request.lora_request
        m, most = adapter.num_virtual_tokens, adapter.longest_text(self.max_model_len)
        if len(text) > most:
            return (
                f"prompt: expected at most {most} tokens for the adapter "
                f"{named.lora_name!r}, got {len(text)}"
            )
        # vLLM takes adapters of one name for one. Here a name's old and new one may share a batch.
        request.lora_request = LoRARequest(
            f"{named.lora_name}:{named.lora_int_id}", named.lora_int_id, named.lora_path
        )
        request.prompt_token_ids = [self._token] * m + text
        request._all_token_ids[:0] = [self._token] * m
        request.num_prompt_tokens += m
        request.cache_salt = f"{adapter.sha256}{request.cache_salt or ''}"
        request.block_hashes.clear()
        request.update_block_hashes()
        return ""

    def _adapter(self, named: Any) -> VLLMAdapter:
        key = (named.lora_int_id, named.lora_path)
        if key not in self._adapters:
            self._adapters[key] = read_vllm_sizes(named.lora_path)
        return self._adapters[key]

    def has_finished_requests(self) -> bool:
        above: Any = super()
        return bool(self._refused) or above.has_finished_requests()

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of a step, and a last one of each request that was refused."""
        above: Any = super()
        outputs = above.update_from_output(*args, **kwargs)
        refused, self._refused = self._refused, []
        for request, wrong in refused:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.finished_requests = {
                *(of_client.finished_requests or ()),
                request.request_id,
            }
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=wrong,
                )
            )
        return outputs


class _Scheduler(_Prompted, Scheduler):  # type: ignore[misc]
    """Between two steps."""


class _AsyncScheduler(_Prompted, AsyncScheduler):  # type: ignore[misc]
    """While a step runs."""


def scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """vLLM's ``scheduler_cls``: that of the kind that the config asks for."""
    kind = _AsyncScheduler if vllm_config.scheduler_config.async_scheduling else _Scheduler
    return kind(vllm_config, *args, **kwargs)
