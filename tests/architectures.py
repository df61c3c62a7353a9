"""Tiny random models of many architectures, shared by the tests.

Width 32, 2 layers, weights strong enough that every token shows in the logits, positions and window
sizes small enough to matter, and dropout left on where the architecture has it: the wrapper has to
keep the backbone in evaluation mode. Ids 0, 1 and 2 are padding, start and end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

VOCABULARY = 61
WIDTH = 32
NUM_LABELS = 3
POSITIONS = 64

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TASKS = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
ENCODER, DECODER, BOTH = "encoder", "decoder", "encoder-decoder"

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Architecture:
    """One kind of model and the sizes at which it is tiny.

    Attributes:
        name: as a reader knows it.
        kind: ``"encoder"``, ``"decoder"`` or ``"encoder-decoder"``.
        model_type: the library's name of its config.
        choices: fields of the config.
        tasks: the tasks that the library has a model for.
        width: of the token embeddings, d.
    """

    name: str
    kind: str
    model_type: str
    choices: dict[str, Any] = field(repr=False)
    tasks: tuple[str, ...]
    width: int = WIDTH

    def config(self, **changes: Any) -> Any:
        """The library's config with these fields changed."""
        import transformers

        values = {**SPECIAL, "num_labels": NUM_LABELS, **self.choices, **changes}
        return transformers.AutoConfig.for_model(self.model_type, **values)

    def build(
        self,
        task: str,
        *,
        bare: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 7,
        **changes: Any,
    ) -> Any:
        """A random model for a task, in training mode, the same on every call.

        Args:
            task: one of ``tasks``.
            bare: without the task's head. An encoder-decoder's encoder half, which is what every
                task but SEQ_2_SEQ_LM gets of it, has none in any case.
            dtype: of the weights.
            seed: of the weights.
            **changes: fields of the config.
        """
        import transformers

        if task not in self.tasks and not bare:
            raise ValueError(f"task: expected one of {', '.join(self.tasks)}, got {task!r}")
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        half = self.kind == BOTH and task != "SEQ_2_SEQ_LM"
        kind = getattr(transformers, _AUTO["FEATURE_EXTRACTION" if bare or half else task])
        model = kind.from_config(self.config(**changes), dtype=torch.float32)
        torch.set_rng_state(state)
        if half:
            model = model.get_encoder()
        # Some configs put the normalisation's scale and the biases at one and zero, where an
        # omission would not show.
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
        return model.to(dtype).train()


_ENCODER = ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
_DECODER = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
_BOTH = ("SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")

_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_BERT = {**_SIZES, **_DROPOUT}
_T5 = {
    "d_model": WIDTH,
    "d_ff": 48,
    "d_kv": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    # Buckets that are narrower than the rows, so that distances count.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.2,
    "dropout": 0.1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

ARCHITECTURES = (
    Architecture("T5", BOTH, "t5", {**_T5, "feed_forward_proj": "gelu"}, _BOTH),
    Architecture(
        "T5 v1.1",
        BOTH,
        "t5",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _BOTH,
    ),
    Architecture("BART", BOTH, "bart", _BART, _BOTH),
    Architecture("Llama", DECODER, "llama", {**_GROUPED, "attention_dropout": 0.1}, _DECODER),
    Architecture("Qwen2", DECODER, "qwen2", {**_GROUPED, "attention_dropout": 0.1}, _DECODER),
    Architecture("Qwen3", DECODER, "qwen3", {**_GROUPED, "attention_dropout": 0.1}, _DECODER),
    Architecture(
        "Mistral",
        DECODER,
        "mistral",
        {**_GROUPED, "sliding_window": 5, "attention_dropout": 0.1},
        _DECODER,
    ),
    Architecture(
        "Gemma 2",
        DECODER,
        "gemma2",
        {**_GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 8, "attention_dropout": 0.1},
        _DECODER,
    ),
    Architecture(
        "Gemma 3",
        DECODER,
        "gemma3_text",
        {
            **_GROUPED,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "attention_dropout": 0.1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
    ),
    Architecture(
        "GPT-2",
        DECODER,
        "gpt2",
        {
            "n_embd": WIDTH,
            "n_inner": 48,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": POSITIONS,
            "initializer_range": 0.2,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
        },
        _DECODER,
    ),
    Architecture(
        "OPT",
        DECODER,
        "opt",
        {
            "hidden_size": WIDTH,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": 24,
            "init_std": 0.2,
            "dropout": 0.1,
        },
        ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
        width=24,
    ),
    Architecture(
        "GPT-NeoX",
        DECODER,
        "gpt_neox",
        {**_SIZES, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        _DECODER,
    ),
    Architecture(
        "Phi",
        DECODER,
        "phi",
        {**_SIZES, "resid_pdrop": 0.1, "partial_rotary_factor": 0.5},
        _DECODER,
    ),
    Architecture(
        "BLOOM",
        DECODER,
        "bloom",
        {
            "hidden_size": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.2,
            "hidden_dropout": 0.1,
        },
        _DECODER,
    ),
    Architecture("BERT", ENCODER, "bert", _BERT, _ENCODER),
    Architecture(
        "RoBERTa",
        ENCODER,
        "roberta",
        {**_BERT, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0},
        _ENCODER,
    ),
    Architecture(
        "DistilBERT",
        ENCODER,
        "distilbert",
        {
            "dim": WIDTH,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
            "dropout": 0.1,
        },
        _ENCODER,
    ),
    Architecture("ALBERT", ENCODER, "albert", {**_BERT, "embedding_size": 16}, _ENCODER, width=16),
    Architecture(
        "ELECTRA", ENCODER, "electra", {**_BERT, "embedding_size": 16}, _ENCODER, width=16
    ),
    Architecture(
        "DeBERTa v3",
        ENCODER,
        "deberta-v2",
        {
            **_BERT,
            "type_vocab_size": 0,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "position_buckets": 4,
            "max_relative_positions": -1,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        _ENCODER,
    ),
    Architecture(
        "ModernBERT",
        ENCODER,
        "modernbert",
        {
            **_SIZES,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "initializer_cutoff_factor": 2.0,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            "mlp_dropout": 0.1,
        },
        _ENCODER,
    ),
)

# Less common kinds, each with something that the ones above have not. Their invariances are tested,
# and nothing else.
FURTHER = (
    Architecture("Gemma", DECODER, "gemma", _GROUPED, ("CAUSAL_LM", "FEATURE_EXTRACTION")),
    Architecture("Phi-3", DECODER, "phi3", {**_SIZES, "sliding_window": 5}, _DECODER),
    Architecture(
        "GPT-J",
        DECODER,
        "gptj",
        {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": POSITIONS,
            "rotary_dim": 8,
            "initializer_range": 0.2,
            "resid_pdrop": 0.1,
        },
        ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
    ),
    Architecture(
        "Falcon, ALiBi",
        DECODER,
        "falcon",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
            "alibi": True,
            "hidden_dropout": 0.1,
        },
        _DECODER,
    ),
    Architecture(
        "Mamba",
        DECODER,
        "mamba",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "state_size": 4,
            "initializer_range": 0.2,
        },
        ("CAUSAL_LM", "FEATURE_EXTRACTION"),
    ),
    Architecture(
        "LFM2",
        DECODER,
        "lfm2",
        {
            **_GROUPED,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        ("CAUSAL_LM", "FEATURE_EXTRACTION"),
    ),
    Architecture("mBART", BOTH, "mbart", _BART, _BOTH),
    Architecture("M2M100", BOTH, "m2m_100", _BART, _BOTH),
    Architecture(
        "MPNet", ENCODER, "mpnet", {**_BERT, "pad_token_id": 1, "bos_token_id": 0}, _ENCODER
    ),
    Architecture("EuroBERT", ENCODER, "eurobert", {**_GROUPED, "attention_dropout": 0.1}, _ENCODER),
    Architecture(
        "XLNet",
        ENCODER,
        "xlnet",
        {
            "d_model": WIDTH,
            "n_layer": 2,
            "n_head": 2,
            "d_inner": 48,
            "initializer_range": 0.2,
            "dropout": 0.1,
        },
        ("TOKEN_CLS", "FEATURE_EXTRACTION"),
    ),
)
BY_NAME = {architecture.name: architecture for architecture in (*ARCHITECTURES, *FURTHER)}

# Not every model can have a prompt put before it: the first takes ids only, the second no mask.
UNFIT = (
    Architecture(
        "CPM-Ant",
        DECODER,
        "cpmant",
        {"hidden_size": WIDTH, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 48}
        | {"num_hidden_layers": 2, "prompt_types": 2, "prompt_length": 2, "segment_types": 2},
        ("CAUSAL_LM",),
    ),
    Architecture("FNet", ENCODER, "fnet", {**_SIZES, "hidden_dropout_prob": 0.1}, _ENCODER),
)


def names(task: str | None = None, kind: str | None = None) -> list[str]:
    """The names of the architectures for a task or of a kind, in the table's order."""
    return [
        a.name
        for a in ARCHITECTURES
        if (task is None or task in a.tasks) and (kind is None or a.kind == kind)
    ]


def build(name: str, task: str, **choices: Any) -> Any:
    """:meth:`Architecture.build` of the architecture with this name."""
    return BY_NAME[name].build(task, **choices)


class _Doubles(TorchFunctionMode):
    """Models take norms and softmaxes in float32, also of tensors in float64; here these stay."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(_double(a) for a in args)
            kwargs = {name: _double(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)


def _double(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextmanager
def in_float64() -> Iterator[None]:
    """Within it a model in float64 rounds nothing to float32 on its way."""
    with _Doubles():
        yield
