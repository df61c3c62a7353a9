"""Train a prompt before a backbone in 4 bits (NF4, bitsandbytes), on a GPU or on a CPU.

    pip install '.[train,nf4]'
    python examples/nf4_backbone.py --output adapter

The backbone's linear layers take half a byte a weight; the prompt stays in float32. The adapter can
be put before the same backbone in any precision.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ept_fast import EPTConfig, EPTModel, get_ept_model

MODEL = "meta-llama/Llama-3.2-1B"  # or meta-llama/Llama-3.1-8B, Qwen/Qwen2.5-7B
TEXTS = [
    "Dear guest, your table for two is ready at seven.",
    "Dear guest, your room on the third floor is ready.",
    "Dear guest, your taxi to the station waits outside.",
    "Dear guest, your breakfast is served until ten.",
    "Dear guest, your parcel is at the front desk.",
    "Dear guest, your boat leaves from the north pier.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="folder or hub id of a decoder")
    parser.add_argument("--output", default="adapter", help="folder for the trained adapter")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    decoder = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=quantised,
        dtype=torch.bfloat16,
        device_map={"": device},
        trust_remote_code=False,
    )
    print(f"backbone: {decoder.get_memory_footprint() / 1e6:.1f} MB in 4 bits")

    # As many trained parameters as a plain prompt of 100 tokens, in a prompt of 20.
    config = EPTConfig.from_budget(
        decoder.config.hidden_size, prompt_length=100, num_virtual_tokens=20, max_length=128
    )
    model = get_ept_model(decoder, config, "CAUSAL_LM")
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(
        model.parameter_groups(prompt_lr=3e-2, offset_lr=3e-3, space_lr=3e-3, head_lr=0)
    )
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt").to(device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for step in range(args.steps):
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(args.output)

    model = EPTModel.from_pretrained(args.output, model.unload())
    start = tokenizer("Dear guest, your", return_tensors="pt").to(device)
    made = model.generate(**start, max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(made[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
