"""Train a classifier's prompt in two processes with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/torchrun_two_processes.py --output adapter

Each process has the whole frozen encoder and half of every batch; only the gradients of the prompt
and the head, a few hundred kilobytes, go from one to the other. On GPUs each process takes its own
(nccl), on a CPU they share it (gloo).
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModel, AutoTokenizer

from ept_fast import EPTConfig, EPTModel, get_ept_model

MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # or FacebookAI/roberta-base
LABELS = ["question", "order"]
ROWS = [
    ("do you have a table for two", 0),
    ("when does the kitchen close", 0),
    ("is there fish in the soup", 0),
    ("what does the house wine cost", 0),
    ("may we sit by the window", 0),
    ("is the bread fresh", 0),
    ("two bowls of soup please", 1),
    ("one glass of red wine", 1),
    ("i take the fish with rice", 1),
    ("bring us some bread and butter", 1),
    ("the same again for both of us", 1),
    ("a pot of tea and the cake", 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="folder or hub id of an encoder")
    parser.add_argument("--output", default="adapter", help="folder for the trained adapter")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")  # torchrun has set the environment
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    torch.manual_seed(0)  # the same prompt in every process
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    encoder = AutoModel.from_pretrained(args.model, trust_remote_code=False).to(device)
    # As many trained parameters as a plain prompt of 100 tokens, in a prompt of 20.
    config = EPTConfig.from_budget(
        encoder.config.hidden_size, prompt_length=100, num_virtual_tokens=20, max_length=64
    )
    model = get_ept_model(encoder, config, "SEQ_CLS", labels=LABELS)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(prompt_lr=1e-2, offset_lr=1e-3, space_lr=1e-3, head_lr=5e-3)
    )

    def collate(rows):
        texts, labels = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor(labels)}

    sampler = DistributedSampler(ROWS, seed=0)  # every process another half of the rows
    loader = DataLoader(ROWS, batch_size=3, sampler=sampler, collate_fn=collate)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for batch in loader:
            loss = parallel(**{name: value.to(device) for name, value in batch.items()}).loss
            loss.backward()  # the gradients are now the mean over both processes
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            mean = total.item() / (len(loader) * dist.get_world_size())
            print(f"epoch {epoch + 1}: loss {mean:.4f}", flush=True)

    checksum = sum(p.detach().double().sum() for p in model.prompt.parameters()).item()
    print(f"process {rank}: the prompt adds up to {checksum:.6f}", flush=True)
    if rank == 0:
        model.save_pretrained(args.output)
        model = EPTModel.from_pretrained(args.output, model.unload())
        batch = tokenizer("is the soup fresh", return_tensors="pt").to(device)
        answer = model(**batch).logits.argmax(-1).item()
        print(f"is the soup fresh: {model.labels[answer]}")
    # The wrapper goes first. If it held the process group last, its destructor would wait, with
    # Python's lock, for a thread of gloo that needs that lock.
    del parallel
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
