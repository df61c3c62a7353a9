"""Candidate prompts scored many at a time, beside a forward for each of them.

    python -m bench.candidates                  # the embedded MiniLM encoder and a random decoder

Every candidate is scored on every text by ``ept_fast.search.CandidateScorer``, by a forward for
each pair without any padding (``one_by_one``), and by a forward for each candidate over all
texts, padded on the right (``per_candidate``). The encoder has the prompt before the text and
answers by cosine to label embeddings; the decoder has it behind the text and answers by label words
at its last token. A round does the work in all three ways, and begins with another one than the
round before; ratios are medians over the rounds, with the ends of their 95% interval. ``error`` is
the largest difference of a logit to that of one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

from bench.accuracy.study import embedded_model, encoder_name
from bench.environment import origin_of, slug
from bench.inputs import DTYPES
from bench.rows import RESULTS, rounded, write_csv
from bench.timing import Clock, median_interval, no_collection
from ept_fast.search import CandidateScorer, LabelEmbeddings, LabelWords
from ept_fast.transformers.backbone import load_backbone

FOLDER = RESULTS / "candidates"
LENGTHS = {"short": (6, 14), "long": (14, 54)}  # tokens of a text, as of trec and of sst2
CLASSES = 4
SCORER, ONE_BY_ONE, PER_CANDIDATE = WAYS = ("scorer", "one_by_one", "per_candidate")

Row = dict[str, Any]
Work = Callable[[], Tensor]


def random_decoder(dtype: torch.dtype) -> Any:
    """A Llama of MiniLM's width and depth with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=12, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def texts_of(vocabulary: int, count: int, shortest: int, longest: int) -> list[Tensor]:
    """Random token ids, of lengths drawn evenly."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g)
    return [torch.randint(vocabulary // 4, vocabulary, (int(n),), generator=g) for n in lengths]


def encoder_ways(encoder: Any, prompts: Tensor, texts: list[Tensor]) -> dict[str, Work]:
    """Prompt before the text, cosine of the text's mean state to label embeddings."""
    m = prompts.shape[1]
    g = torch.Generator().manual_seed(1)
    readout = LabelEmbeddings(torch.randn(CLASSES, encoder.config.hidden_size, generator=g))
    scorer = CandidateScorer(encoder, readout)
    ids, mask = padded(texts)

    def pair(prompt: Tensor, text: Tensor) -> Tensor:
        states = encoder(input_ids=torch.cat([prompt, text])[None]).last_hidden_state
        return readout(states[:, m:].float().mean(1))

    def candidate(prompt: Tensor) -> Tensor:
        rows = torch.cat([prompt.expand(len(ids), -1), ids], 1)
        real = torch.cat([torch.ones(len(ids), m, dtype=torch.int64), mask], 1)
        states = encoder(input_ids=rows, attention_mask=real).last_hidden_state[:, m:].float()
        weights = mask.unsqueeze(2)
        return readout((states * weights).sum(1) / weights.sum(1))

    return ways(prompts, texts, lambda: scorer(prompts, ids, mask), pair, candidate)


def decoder_ways(decoder: Any, prompts: Tensor, texts: list[Tensor]) -> dict[str, Work]:
    """Prompt behind the text, label words at its last token."""
    m = prompts.shape[1]
    words = torch.arange(CLASSES) + 100
    scorer = CandidateScorer(decoder, LabelWords(words), order="text prompt")
    ids, mask = padded(texts)
    # Padding on the left, so that the last column is every row's last token.
    order = mask.argsort(dim=1, stable=True)
    left, real = ids.gather(1, order), mask.gather(1, order)

    def pair(prompt: Tensor, text: Tensor) -> Tensor:
        logits = decoder(input_ids=torch.cat([text, prompt])[None], logits_to_keep=1).logits
        return logits[:, -1, words].float()

    def candidate(prompt: Tensor) -> Tensor:
        rows = torch.cat([left, prompt.expand(len(ids), -1)], 1)
        seen = torch.cat([real, torch.ones(len(ids), m, dtype=torch.int64)], 1)
        ranks = (seen.cumsum(1) - 1).clamp_min(0)
        logits = decoder(
            input_ids=rows, attention_mask=seen, position_ids=ranks, logits_to_keep=1
        ).logits
        return logits[:, -1, words].float()

    return ways(prompts, texts, lambda: scorer(prompts, ids, mask), pair, candidate)


def padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([[len(text)] for text in texts])
    return ids, (torch.arange(ids.shape[1]) < lengths).long()


def ways(
    prompts: Tensor,
    texts: list[Tensor],
    scorer: Work,
    pair: Callable[[Tensor, Tensor], Tensor],
    candidate: Callable[[Tensor], Tensor],
) -> dict[str, Work]:
    """The three ways to logits ``[N, B, C]``."""
    return {
        SCORER: scorer,
        ONE_BY_ONE: lambda: torch.stack([torch.cat([pair(p, t) for t in texts]) for p in prompts]),
        PER_CANDIDATE: lambda: torch.stack([candidate(p) for p in prompts]),
    }


@torch.inference_mode()
def measure(work: Mapping[str, Work], rounds: int) -> Row:
    """The columns of times, ratios and error."""
    clock = Clock(torch.device("cpu"), 0, 0, 0)
    elapsed: dict[str, list[float]] = {way: [] for way in WAYS}
    found = {way: work[way]() for way in WAYS}  # warms up
    with no_collection():
        for number in range(rounds):
            shift = number % len(WAYS)
            for way in (*WAYS[shift:], *WAYS[:shift]):
                clock.synchronize()
                begin = time.perf_counter()
                work[way]()
                clock.synchronize()
                elapsed[way].append(1e3 * (time.perf_counter() - begin))
    row: Row = {f"{way}_ms": median(times) for way, times in elapsed.items()}
    for way in (ONE_BY_ONE, PER_CANDIDATE):
        pairs = zip(elapsed[way], elapsed[SCORER], strict=True)
        middle, low, high = median_interval([theirs / ours for theirs, ours in pairs])
        row |= {f"{way}_ratio": middle, f"{way}_low": low, f"{way}_high": high}
    row["error"] = float((found[SCORER] - found[ONE_BY_ONE]).abs().max())
    return row


def table(rows: Iterable[Row]) -> str:
    """The rows as docs/search.md shows them."""
    header = (
        "| model | texts | one by one (ms) | a candidate at a time (ms) | scorer (ms) | faster |"
    )
    lines = [header, "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        times = (f"{row[f'{way}_ms']:.0f}" for way in (ONE_BY_ONE, PER_CANDIDATE, SCORER))
        low, middle, high = (row[f"{ONE_BY_ONE}_{name}"] for name in ("low", "ratio", "high"))
        ratio = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        lines.append(f"| {' | '.join((row['model'], row['texts'], *times, ratio))} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", help="Folder or hub id of an encoder; the embedded MiniLM if not given.")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="float32", help="Of the models.")
@click.option("--candidates", default=64, help="N.")
@click.option("--tokens", default=4, help="m, of a prompt.")
@click.option("--batch", default=8, help="B, the texts.")
@click.option("--rounds", default=5)
@click.option("--out", type=click.Path(path_type=Path), help="The CSV file.")
def main(
    model: str | None, dtype: str, candidates: int, tokens: int, batch: int, rounds: int,
    out: Path | None,
) -> None:  # fmt: skip
    """Time all three ways on an encoder and a decoder, with short and with long texts."""
    encoder: Any = load_backbone(model or embedded_model(), dtype=DTYPES[dtype]).eval()
    name = encoder_name(model)
    decoder = random_decoder(DTYPES[dtype])
    origin = origin_of(torch.device("cpu"))
    kinds = {name: (encoder, encoder_ways), "random Llama": (decoder, decoder_ways)}
    rows: list[Row] = []
    for name, (backbone, of) in kinds.items():
        vocabulary = backbone.get_input_embeddings().num_embeddings
        g = torch.Generator().manual_seed(2)
        prompts = torch.randint(vocabulary, (candidates, tokens), generator=g)
        for texts, lengths in LENGTHS.items():
            work = of(backbone, prompts, texts_of(vocabulary, batch, *lengths))
            how: Row = {
                "model": name, "texts": texts, "candidates": candidates, "batch": batch,
                "tokens": tokens, "dtype": dtype,
            }  # fmt: skip
            rows.append({**how, **measure(work, rounds), "rounds": rounds, **origin})
    written = [rounded(row) for row in rows]
    write_csv(out or FOLDER / f"{slug(origin['device'])}.csv", written[0], written)
    click.echo(table(rows))


if __name__ == "__main__":
    main()
