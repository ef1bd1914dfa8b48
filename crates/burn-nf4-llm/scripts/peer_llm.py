"""Times transformers with bitsandbytes, for `burn-nf4 bench --peer python3`.

usage: peer_llm.py JOB

JOB is JSON:
  config         the config.json of the model
  device         cuda or cpu
  dtype          float32, float16 or bfloat16
  quantize_head  whether the head is in 4 bit too
  decode         pairs of a batch and a context: tokens are generated behind a prompt of that length
  tokens         how many, after the first
  prefill        lengths of prompts
Without `config` it only says whether all that it needs is there.

The model has random weights: each linear layer becomes a Linear4bit of bitsandbytes, NF4 with double
quantization, as `from_pretrained` makes it, but for the head and routers. No checkpoint is needed.

Prints a JSON object a line, with the field `what`: hello, missing, decode, prefill, left_out. Exits with 3
if something is missing.
"""

import importlib
import json
import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def emit(what, **fields):
    print(json.dumps({"what": what, **fields}), flush=True)


def missing(name, message):
    emit("missing", name=name, message=message)
    sys.exit(3)


def need(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation raises all sorts
        missing(name, f"{type(error).__name__}: {error}".splitlines()[0])


job = json.loads(sys.argv[1])
torch = need("torch")
transformers = need("transformers")
bitsandbytes = need("bitsandbytes")
device = job["device"]
if device == "cuda" and not torch.cuda.is_available():
    missing("CUDA", f"torch {torch.__version__} sees no CUDA device")


def synchronize():
    if device == "cuda":
        torch.cuda.synchronize()


class Clock(transformers.StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def in_4_bit(linear, dtype):
    # It would draw a weight of its own on the CPU, which takes minutes for a model of 8B.
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    layer.bias = linear.bias
    return layer.to(device)


def make():
    dtype = getattr(torch, job["dtype"])
    job["config"].pop("quantization_config", None)
    config = transformers.AutoConfig.for_model(**job["config"])
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    for name, module in layers:
        is_head = name.split(".")[-1] == "lm_head"
        if (is_head and not job["quantize_head"]) or name.endswith(".mlp.gate"):
            continue
        model.set_submodule(name, in_4_bit(module, dtype))
    # A text ends when it has its tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def decode(model, batch, context, tokens):
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=device)
    # The first tokens warm it up.
    for count in (min(8, tokens), tokens):
        clock = Clock()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count + 1,
                min_new_tokens=count + 1,
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
    steps = [after - before for before, after in zip(clock.times, clock.times[1:])]
    emit(
        "decode",
        batch=batch,
        context=context,
        tokens_s=batch * len(steps) / sum(steps),
        step_ms=statistics.median(steps) * 1e3,
        peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


def prefill(model, tokens):
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), device=device)
    times = []
    for _ in range(7):
        synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model(ids, logits_to_keep=1).logits.cpu()
        times.append(time.perf_counter() - start)
    emit("prefill", tokens=tokens, ms=statistics.median(times[2:]) * 1e3)


def measured(what, call, *arguments):
    try:
        call(*arguments)
    except torch.OutOfMemoryError as error:
        emit("left_out", of=what, why=str(error).splitlines()[0])
        torch.cuda.empty_cache()


def main():
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    versions = ", ".join(
        f"{module.__name__} {module.__version__}" for module in (transformers, bitsandbytes, torch)
    )
    emit("hello", text=f"{versions}, {name}")
    if "config" not in job:
        return
    model = make()
    for batch, context in job["decode"]:
        what = f"batch {batch} at {context}"
        measured(what, decode, model, batch, context, job["tokens"])
    for tokens in job["prefill"]:
        measured(f"a prompt of {tokens}", prefill, model, tokens)


main()
