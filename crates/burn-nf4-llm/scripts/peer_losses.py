"""QLoRA runs of transformers and PEFT, to be repeated by `examples/peer_losses.rs`.

    python3 peer_losses.py train MODEL TEXT OUT [--dtype float32] [--device cpu] [--seed 0] [--steps 200] [--rows 2]
                                 [--length 128] [--lr 2e-4]
    cargo run --release -p burn-nf4-llm --example peer_losses -- FOLDER OUT
    python3 peer_losses.py table OUT... [--json FILE]

`train` writes OUT/adapter_init, the batches in their order (OUT/batches.safetensors, `[steps, rows, length]`) and
OUT/train.json with the losses. `--dtype` is what is computed in and what weights in NF4 are decoded to; branches
are in f32. The seed decides the factors of the branches only: runs of one text have one order of batches.
On a GPU, MODEL is the folder in NF4. On a CPU it is what `burn-nf4 dequantize --dtype float32` makes of that:
bitsandbytes 0.50 does not compute in f32 there, and the first loss was apart by 1.6e-2.

The example writes OUT/ours.json. `table` prints of each run the means of the last 20 losses of both, how far these
are apart, and the largest difference between two losses of one step; and for runs of both types from one seed the
same between the types.
"""
import argparse
import itertools
import json
import math
import os
import sys

LAST = 20
MAX_GRAD_NORM = 1.0


def train(a):
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, a.dtype)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    with open(a.text, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])
    pieces = ids[: len(ids) // a.length * a.length].reshape(-1, a.length)
    if len(pieces) == 0:
        sys.exit(f"{a.text} has {len(ids)} tokens, fewer than --length {a.length}")
    # Epochs one after the other, each in an order of its own.
    epochs = -(-a.steps * a.rows // len(pieces))
    order = torch.cat([torch.randperm(len(pieces)) for _ in range(epochs)])[: a.steps * a.rows]
    batches = pieces[order].reshape(a.steps, a.rows, a.length)

    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype, device_map={"": a.device})
    in_4_bit = decode_to(model, dtype)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(a.seed)
    model = get_peft_model(model, lora)
    model.save_pretrained(os.path.join(a.out, "adapter_init"))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.dtype != torch.float32 for parameter in trained):
        sys.exit(f"branches are in {sorted({str(p.dtype) for p in trained})}, expected float32")
    optimizer = torch.optim.AdamW(trained, lr=a.lr, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches.to(a.device), 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}/{a.steps}  loss {losses[-1]:.6f}", flush=True)
    save_file({"batches": batches.contiguous()}, os.path.join(a.out, "batches.safetensors"))
    run = {
        "lr": a.lr,
        "max_grad_norm": MAX_GRAD_NORM,
        "dtype": a.dtype,
        "seed": a.seed,
        "device": a.device,
        "layers_in_4_bit": in_4_bit,
        "losses": losses,
    }
    write(os.path.join(a.out, "train.json"), run)


def decode_to(model, dtype):
    """Has weights in NF4 decoded to this type and multiplied in it, whatever they were quantized from, and says how
    many there are."""
    count = 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = dtype
            module.compute_dtype, module.compute_type_is_set = dtype, True
            count += 1
    return count


def write(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def end(losses):
    last = losses[-LAST:]
    return sum(last) / len(last)


def apart(one, other):
    """How far two runs over the same batches are apart."""
    if len(one) != len(other) or not all(map(math.isfinite, one + other)):
        sys.exit(f"{len(one)} losses and {len(other)}, expected as many of each, and finite ones")
    return {
        "end_difference": abs(end(one) - end(other)),
        "largest_difference": max(abs(x - y) for x, y in zip(one, other)),
    }


def table(a):
    runs = []
    for folder in a.out:
        theirs, ours = (read(os.path.join(folder, name)) for name in ("train.json", "ours.json"))
        name = {key: theirs[key] for key in ("dtype", "seed")}
        runs.append((name, {"peft": theirs["losses"], "ours": ours["losses"]}))
    rows, pairs = [], []
    for name, losses in runs:
        ends = {f"{who}_end": end(of) for who, of in losses.items()}
        start = {"steps": len(losses["ours"]), "first": losses["peft"][0]}
        rows.append({**name, **start, **ends, **apart(losses["peft"], losses["ours"])})
    for (one, losses), (other, others) in itertools.combinations(runs, 2):
        # What a type, or another draw of the branches, does to one library.
        what = [key for key in one if one[key] != other[key]]
        if len(what) == 1:
            between = f"{what[0]} {one[what[0]]}, {other[what[0]]}"
            same = {key: value for key, value in one.items() if key != what[0]}
            pairs += [
                {"who": who, "between": between, **same, **apart(losses[who], others[who])}
                for who in losses
            ]
    heads = f"{'type':>9} {'seed':>5} {'first':>8} {'end PEFT':>9} {'ours':>9} {'apart':>8} {'a step, at most':>16}"
    print(heads)
    for row in rows:
        print(
            f"{row['dtype']:>9} {row['seed']:>5} {row['first']:>8.4f} {row['peft_end']:>9.5f} {row['ours_end']:>9.5f} "
            f"{row['end_difference']:>8.1e} {row['largest_difference']:>16.1e}"
        )
    for pair in pairs:
        print(
            f"{pair['who']}, {pair['between']}: ends apart by {pair['end_difference']:.1e}, "
            f"a step by at most {pair['largest_difference']:.1e}"
        )
    if a.json:
        write(a.json, {"last": LAST, "runs": rows, "pairs": pairs})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    for name in ("model", "text", "out"):
        one.add_argument(name)
    for name, default in [("steps", 200), ("rows", 2), ("length", 128), ("lr", 2e-4), ("seed", 0)]:
        one.add_argument(f"--{name}", type=type(default), default=default)
    one.add_argument("--device", default="cpu")
    one.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    one.set_defaults(run=train)
    all_ = commands.add_parser("table")
    all_.add_argument("out", nargs="+")
    all_.add_argument("--json")
    all_.set_defaults(run=table)
    a = parser.parse_args()
    a.run(a)


main()
