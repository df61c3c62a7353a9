"""Train a prompt before a decoder on instructions and answers, with the Trainer, then generate.

    python examples/causal_instructions.py --output adapter

The data is the list below, or --data FILE with a line {"text": ..., "target": ...} for each row.
Only the answers count in the loss.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from ept_fast import EPTConfig, EPTModel, get_ept_model

MODEL = "meta-llama/Llama-3.2-1B"  # or Qwen/Qwen2.5-0.5B, openai-community/gpt2
ROWS = [
    {"text": "Name a colour of the rainbow.", "target": "Green."},
    {"text": "Name a month with thirty days.", "target": "June."},
    {"text": "Name an animal that lives in water.", "target": "The otter."},
    {"text": "Name a tool for cutting wood.", "target": "A saw."},
    {"text": "Name a fruit with a stone.", "target": "The plum."},
    {"text": "Name a bird that cannot fly.", "target": "The ostrich."},
    {"text": "Name a metal that is liquid when warm.", "target": "Gallium."},
    {"text": "Name a planet with rings.", "target": "Saturn."},
]
MAX_LENGTH = 256
MAX_ANSWER = 64  # of these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="folder or hub id of a decoder")
    parser.add_argument("--data", type=Path, help="JSONL rows with text and target")
    parser.add_argument("--output", default="adapter", help="folder for the trained adapter")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    rows = [json.loads(line) for line in args.data.open()] if args.data else ROWS
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    decoder = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        trust_remote_code=False,
    )
    # As many trained parameters as a plain prompt of 100 tokens, in a prompt of 20. The offset
    # covers the text and what is generated after it.
    config = EPTConfig.from_budget(
        decoder.config.hidden_size, prompt_length=100, num_virtual_tokens=20, max_length=MAX_LENGTH
    )
    model = get_ept_model(decoder, config, "CAUSAL_LM")
    model.print_trainable_parameters()

    tokenizer.truncation_side = "left"  # of a long text what stands next to the answer is kept
    room = MAX_LENGTH - MAX_ANSWER

    def example(row):
        question = tokenizer(row["text"], truncation=True, max_length=room)["input_ids"]
        answer = tokenizer(" " + row["target"], add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id][:MAX_ANSWER]
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{args.output}/checkpoints",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            gradient_checkpointing=on_gpu,  # trades time for the activations' memory
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[example(row) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(
            torch.optim.AdamW(
                model.parameter_groups(prompt_lr=3e-2, offset_lr=3e-3, space_lr=3e-3, head_lr=0)
            ),
            None,
        ),
    )
    trainer.train()
    model.save_pretrained(args.output)

    model = EPTModel.from_pretrained(args.output, model.unload())
    texts = [row["text"] for row in rows[:4]]
    tokenizer.padding_side = "left"  # new tokens follow the text
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=room, return_tensors="pt"
    ).to(model.device)
    made = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_ANSWER,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = made[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(answers, skip_special_tokens=True)
    for text, answer in zip(texts, answers, strict=True):
        print(f"{text} -> {answer.strip()}")


if __name__ == "__main__":
    main()
