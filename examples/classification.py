"""Classify texts: a prompt and a head on a frozen encoder, with the Trainer of transformers.

    python examples/classification.py --output adapter

The data is the list below, or --data FILE with a line {"text": ..., "label": ...} for each row. The
adapter folder holds the prompt and the head, never the encoder.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from ept_fast import EPTConfig, EPTModel, get_ept_model

MODEL = "FacebookAI/roberta-base"  # or google-bert/bert-base-uncased, sentence-transformers/...
ROWS = [
    {"text": "the room was warm and the bed was soft", "label": "praise"},
    {"text": "we slept well and would come again", "label": "praise"},
    {"text": "a lovely breakfast with fresh bread", "label": "praise"},
    {"text": "the staff was kind and quick to help", "label": "praise"},
    {"text": "the garden is a quiet place to read", "label": "praise"},
    {"text": "great value and a view of the lake", "label": "praise"},
    {"text": "the heating was broken all night", "label": "complaint"},
    {"text": "nobody answered when we rang the bell", "label": "complaint"},
    {"text": "the bathroom was dirty and the towels were wet", "label": "complaint"},
    {"text": "we waited an hour for cold coffee", "label": "complaint"},
    {"text": "too loud to sleep because of the street", "label": "complaint"},
    {"text": "they charged us twice and never paid it back", "label": "complaint"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="folder or hub id of an encoder")
    parser.add_argument("--data", type=Path, help="JSONL rows with text and label")
    parser.add_argument("--output", default="adapter", help="folder for the trained adapter")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.data.open()] if args.data else ROWS
    labels = sorted({row["label"] for row in rows})

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    encoder = AutoModel.from_pretrained(args.model, trust_remote_code=False)
    # As many trained parameters as a plain prompt of 100 tokens, in a prompt of 20.
    config = EPTConfig.from_budget(
        encoder.config.hidden_size, prompt_length=100, num_virtual_tokens=20, max_length=128
    )
    model = get_ept_model(encoder, config, "SEQ_CLS", labels=labels)
    model.print_trainable_parameters()

    dataset = [
        {**tokenizer(row["text"], truncation=True, max_length=128)}
        | {"labels": labels.index(row["label"])}
        for row in rows
    ]
    groups = model.parameter_groups(prompt_lr=1e-2, offset_lr=1e-3, space_lr=1e-3, head_lr=5e-3)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{args.output}/checkpoints",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=4,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(torch.optim.AdamW(groups), None),
    )
    trainer.train()
    model.save_pretrained(args.output)

    # What a program that uses the adapter needs: the encoder's name is in the folder.
    model = EPTModel.from_pretrained(args.output)
    model.fold()  # computes the prompt once
    texts = [row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        chosen = model(**batch).logits.argmax(-1).tolist()
    for row, choice in zip(rows[:4], chosen, strict=False):
        print(f"{model.labels[choice]:>10}: {row['text']}")
    right = sum(labels[choice] == row["label"] for row, choice in zip(rows, chosen, strict=True))
    print(f"right on the training data: {right} of {len(rows)}")


if __name__ == "__main__":
    main()
