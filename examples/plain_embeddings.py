"""Serve a prompt where nothing of ept_fast is installed: plain tensors, an unmodified model.

    python examples/plain_embeddings.py --model gpt2 --out prompt_files [--adapter FOLDER]

The first half runs where the prompt was trained and writes two files. The second half is all that a
server needs: torch, safetensors and transformers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["the play was very bright", "a dull walk", "the soup is cold and the song was awful"]


def export(model, adapter: str | None, out: str):
    """Where the prompt was trained: write its constants."""
    from ept_fast import EPTConfig, FusedEPTPrompt, export_plain

    table = model.get_input_embeddings()
    if adapter is not None:
        prompt = FusedEPTPrompt.from_pretrained(adapter, table)
    else:  # one that looks trained
        width = table.weight.shape[-1]
        config = EPTConfig(width, num_virtual_tokens=4, max_length=32, rank=2, num_spaces=2)
        prompt = FusedEPTPrompt(config, table, generator=torch.Generator().manual_seed(0))
        for parameter in prompt.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    export_plain(prompt, out)
    return prompt


def prompted(model, folder: str, input_ids, attention_mask):
    """On the server: embeddings and mask with the prompt before the text."""
    about = json.loads((Path(folder) / "prompt_embeddings.json").read_text())
    tensors = load_file(Path(folder) / "prompt_embeddings.safetensors")
    embeds = model.get_input_embeddings()(input_ids)
    if about["offset"] == "table":
        rank = attention_mask.cumsum(1) - 1  # of each token among its row's real ones
        covered = (attention_mask == 1) & (rank < about["max_length"])
        rows = tensors["offset"][rank.clamp(0, about["max_length"] - 1)]
        embeds = (embeds + rows * covered.unsqueeze(-1)).to(embeds.dtype)
    prompt = tensors["prompt_embeds"].to(embeds.dtype).expand(len(embeds), -1, -1)
    ones = attention_mask.new_ones(len(embeds), about["num_virtual_tokens"])
    return torch.cat([prompt, embeds], dim=1), torch.cat([ones, attention_mask], dim=1)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a causal model")
    parser.add_argument("--out", required=True, help="folder for the two files")
    parser.add_argument("--adapter", help="folder of a trained prompt")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)  # gpt2
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(
        options.model, trust_remote_code=False, padding_side="left"
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    input_ids, mask = batch["input_ids"], batch["attention_mask"]

    prompt = export(model, options.adapter, options.out)
    spliced = prompt(input_ids, attention_mask=mask)
    expected = model(**spliced._asdict()).logits[:, -1]

    embeds, wide_mask = prompted(model, options.out, input_ids, mask)
    positions = (wide_mask.cumsum(1) - 1).clamp(min=0)
    served = model(inputs_embeds=embeds, attention_mask=wide_mask, position_ids=positions).logits[
        :, -1
    ]
    plain = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits[:, -1]

    print(f"largest difference of the logits: {(served - expected).abs().max():.2e}")
    print(f"the prompt changed them by: {(served - plain).abs().max():.2e}")


if __name__ == "__main__":
    main()
