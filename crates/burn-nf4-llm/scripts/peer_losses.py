"""A QLoRA run of transformers and PEFT in f32, to be repeated by `examples/peer_losses.rs`.

    python3 peer_losses.py MODEL TEXT OUT [--steps 200] [--rows 2] [--length 128] [--lr 2e-4] [--device cpu]

MODEL is what `burn-nf4 dequantize` makes of a folder in NF4; on a GPU it may be that folder too, which
bitsandbytes 0.50 does not compute in f32 on a CPU: the first loss was apart by 1.6e-2 there. Writes OUT/adapter_init, the batches in
their order (OUT/batches.safetensors, `[steps, rows, length]`) and OUT/train.json with the losses.
"""
import argparse
import json
import os

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

arguments = argparse.ArgumentParser()
for name in ["model", "text", "out"]:
    arguments.add_argument(name)
for name, default in [("--steps", 200), ("--rows", 2), ("--length", 128), ("--lr", 2e-4), ("--device", "cpu")]:
    arguments.add_argument(name, type=type(default), default=default)
a = arguments.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(a.model)
ids = torch.tensor(tokenizer(open(a.text, encoding="utf-8").read())["input_ids"])
pieces = ids[: len(ids) // a.length * a.length].reshape(-1, a.length)
# Epochs one after the other, each in an order of its own.
epochs = -(-a.steps * a.rows // len(pieces))
order = torch.cat([torch.randperm(len(pieces)) for _ in range(epochs)])[: a.steps * a.rows]
batches = pieces[order].reshape(a.steps, a.rows, a.length)

model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, device_map={"": a.device})
lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
model.save_pretrained(os.path.join(a.out, "adapter_init"))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.lr, weight_decay=0.0)
losses = []
for step, batch in enumerate(batches.to(a.device), 1):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    print(f"step {step}/{a.steps}  loss {losses[-1]:.6f}", flush=True)
save_file({"batches": batches.contiguous()}, os.path.join(a.out, "batches.safetensors"))
with open(os.path.join(a.out, "train.json"), "w") as file:
    json.dump({"lr": a.lr, "losses": losses}, file)
