"""Train a prompt before T5's encoder in a plain PyTorch loop, then generate with it.

    python examples/t5_seq2seq.py --output adapter

The data is the list below, or --data FILE with a line {"text": ..., "target": ...} for each row.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ept_fast import EPTConfig, EPTModel, get_ept_model

MODEL = "google-t5/t5-base"  # or google/flan-t5-large
ROWS = [
    {"text": "The train from Bern is twenty minutes late.", "target": "delay: 20 minutes"},
    {"text": "Your flight to Oslo leaves an hour late.", "target": "delay: 60 minutes"},
    {"text": "The bus is on time.", "target": "no delay"},
    {"text": "We expect the ferry five minutes late.", "target": "delay: 5 minutes"},
    {"text": "All trains run as planned.", "target": "no delay"},
    {"text": "The tram to the harbour is ten minutes behind.", "target": "delay: 10 minutes"},
    {"text": "The night bus leaves half an hour late.", "target": "delay: 30 minutes"},
    {"text": "Flight 23 departs as scheduled.", "target": "no delay"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="folder or hub id of an encoder-decoder")
    parser.add_argument("--data", type=Path, help="JSONL rows with text and target")
    parser.add_argument("--output", default="adapter", help="folder for the trained adapter")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [json.loads(line) for line in args.data.open()] if args.data else ROWS
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(args.model, trust_remote_code=False).to(device)

    def tokens(texts):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return batch["input_ids"].to(device), batch["attention_mask"].to(device)

    # As many trained parameters as a plain prompt of 100 tokens, in a prompt of 20.
    config = EPTConfig.from_budget(
        t5.config.d_model, prompt_length=100, num_virtual_tokens=20, max_length=128
    )
    model = get_ept_model(t5, config, "SEQ_2_SEQ_LM")
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(
        model.parameter_groups(prompt_lr=3e-2, offset_lr=3e-3, space_lr=3e-3, head_lr=0)
    )
    for epoch in range(args.epochs):
        losses = []
        for chosen in torch.randperm(len(rows)).split(8):
            input_ids, attention_mask = tokens([rows[i]["text"] for i in chosen])
            labels, real = tokens([rows[i]["target"] for i in chosen])
            labels = labels.masked_fill(real == 0, -100)  # padding has no loss
            loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.prompt.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}")
    model.save_pretrained(args.output)

    # The model's own name is in the folder; a model that is loaded already can be given instead.
    t5 = model.unload()
    model = EPTModel.from_pretrained(args.output, t5)
    texts = [row["text"] for row in rows[:4]]
    input_ids, attention_mask = tokens(texts)
    made = model.generate(input_ids, attention_mask=attention_mask, num_beams=2, max_new_tokens=16)
    answers = tokenizer.batch_decode(made, skip_special_tokens=True)
    for text, answer in zip(texts, answers, strict=True):
        print(f"{text} -> {answer}")


if __name__ == "__main__":
    main()
