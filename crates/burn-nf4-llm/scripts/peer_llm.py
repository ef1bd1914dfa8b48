"""Times transformers with bitsandbytes, or Unsloth, for `burn-nf4 bench --peer python3`.

usage: peer_llm.py JOB

JOB is JSON:
  library        transformers (also if it is left out) or unsloth, which is measured in training alone
  config         the config.json of the model
  device         cuda or cpu
  dtype          float32, float16 or bfloat16
  quantize_head  whether the head is in 4 bit too
  decode         pairs of a batch and a context: tokens are generated behind a prompt of that length
  tokens         how many, after the first
  prefill        lengths of prompts
  train          steps of QLoRA: rows, tokens of a row, and whether all activations are kept (else gradient
                 checkpointing runs each layer twice)
  lora           of those steps: rank, alpha, and the learning_rate and weight_decay of AdamW
Without `config` it only says whether all that it needs is there. Training needs peft too; without it only the
steps of training are left out.

The model has random weights: each linear layer becomes a Linear4bit of bitsandbytes, NF4 with double
quantization, as `from_pretrained` makes it, but for the head and routers. No checkpoint is needed. peft's
branches are on all those layers but the head, in f32 as peft makes them, without autocast. Unsloth only reads
folders: such a model is written to a temporary one (5.7 GB for 8B), with a tokenizer of four words, and read from
there; inputs of layers that are run twice are kept in the host's memory (its "unsloth" checkpointing).

Prints a JSON object a line, with the field `what`: hello, missing, decode, prefill, train, left_out. Exits
with 3 if something is missing.
"""

import gc
import importlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def emit(what, **fields):
    print(json.dumps({"what": what, **fields}), flush=True)


def missing(name, message):
    emit("missing", name=name, message=message)
    sys.exit(3)


def found(name):
    """The module, and why there is none."""
    try:
        return importlib.import_module(name), None
    except Exception as error:  # a broken installation raises all sorts
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def need(name):
    module, why = found(name)
    return module or missing(name, why)


job = json.loads(sys.argv[1])
device = job["device"]
unsloth, no_unsloth = None, None
if job.get("library") == "unsloth":
    cache = tempfile.TemporaryDirectory(prefix="peer_llm_")
    os.environ["UNSLOTH_COMPILE_LOCATION"] = os.path.join(cache.name, "compiled")
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    if device == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    # Before all that it changes.
    unsloth, no_unsloth = found("unsloth")
torch = need("torch")
transformers = need("transformers")
bitsandbytes = need("bitsandbytes")
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


def with_branches(peft, model):
    """The model with a branch on each layer in 4 bit but the head."""
    # As `from_pretrained` says; peft then takes its layer for bitsandbytes.
    model.is_loaded_in_4bit = True
    layers = {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    lora = job["lora"]
    config = peft.LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=0.0,
        target_modules=sorted(layers - {"lm_head"}),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config).train()


def train(model, rows, tokens, keep_all):
    base = model.get_base_model()
    if keep_all:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    try:
        steps(model, rows, tokens, keep_all)
    finally:
        if not keep_all:
            base.disable_input_require_grads()


def train_by_unsloth(model, rows, tokens, keep_all):
    checkpointing = False if keep_all else "unsloth"
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    steps(model, rows, tokens, keep_all)


def steps(model, rows, tokens, keep_all):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lora = job["lora"]
    optimizer = torch.optim.AdamW(
        trained, lr=lora["learning_rate"], weight_decay=lora["weight_decay"]
    )
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), device=device)
    times = []
    try:
        for step in range(5):
            # The first two make the moments and warm it up.
            if step == 2 and device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = loss.item()
            times.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of {rows} x {tokens} is {loss}")
    finally:
        optimizer.zero_grad(set_to_none=True)
    emit(
        "train",
        rows=rows,
        tokens=tokens,
        keep_all=keep_all,
        ms=statistics.median(times[2:]) * 1e3,
        peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


def shapes():
    """The steps that are asked for: what they are called, rows, tokens, and whether all is kept."""
    for rows, tokens, keep_all in job["train"]:
        yield f"training on {rows} x {tokens}" + (", keeping all" if keep_all else ""), rows, tokens, keep_all


def leave_out_training(why):
    for what, *_ in shapes():
        emit("left_out", of=what, why=why)


def train_all(model, peft, why):
    if peft is None:
        return leave_out_training(f"no peft: {why}")
    model = with_branches(peft, model)
    for what, *shape in shapes():
        measured(what, train, model, *shape)


def train_all_by_unsloth():
    """Its faults are told and are none of the run: it changes much of what is installed, and fits few versions."""
    try:
        model = read_by_unsloth()
    except Exception as error:
        return leave_out_training(fault(error))
    for what, *shape in shapes():
        try:
            measured(what, train_by_unsloth, model, *shape)
        except Exception as error:
            emit("left_out", of=what, why=fault(error))


def fault(error):
    traceback.print_exception(error)
    return f"unsloth: {type(error).__name__}: {error}".splitlines()[0]


def read_by_unsloth():
    """Unsloth's model of a folder with random weights, with branches on what is in 4 bit but the head."""
    folder = os.path.join(cache.name, "model")
    layers = save(make(), folder)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    dtype = getattr(torch, job["dtype"])
    # Beyond the model's positions it scales them, and it checkpoints another way if texts are short.
    positions = min(8192, job["config"].get("max_position_embeddings", 8192))
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=max([positions] + [tokens for _, _, tokens, _ in shapes()]),
        dtype=dtype,
        load_in_4bit=True,
        local_files_only=True,
    )
    # It goes on in another type, or in 16 bit, where it thinks that it must.
    in_4_bit = sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    if in_4_bit == 0 or model.dtype != dtype:
        raise ValueError(f"it read {in_4_bit} layers in 4 bit and computes in {model.dtype}")
    lora = job["lora"]
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=0,
        bias="none",
        target_modules=sorted(layers - {"lm_head"}),
        use_gradient_checkpointing="unsloth",
    )


def save(model, folder):
    """Writes a model as `save_pretrained` does, with a tokenizer, and returns the names of its layers in 4 bit."""
    linears = {
        name: isinstance(module, bitsandbytes.nn.Linear4bit)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, job["dtype"]),
        llm_int8_skip_modules=[name for name, is_in_4_bit in linears.items() if not is_in_4_bit],
    )
    os.makedirs(folder)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    path = os.path.join(folder, "model.safetensors")
    need("safetensors.torch").save_file(tensors, path, metadata={"format": "pt"})
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    tokenizers = need("tokenizers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)
    return {name.split(".")[-1] for name, is_in_4_bit in linears.items() if is_in_4_bit}


def measured(what, call, *arguments):
    try:
        call(*arguments)
    except torch.OutOfMemoryError as error:
        emit("left_out", of=what, why=str(error).splitlines()[0])
    # Not before: the error holds what the call held.
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main():
    by_unsloth = job.get("library") == "unsloth"
    peft, no_peft = found("peft") if job.get("train") else (None, None)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    modules = [module for module in (unsloth, transformers, peft, bitsandbytes, torch) if module]
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    emit("hello", text=f"{versions}, {name}")
    if "config" not in job:
        return
    if by_unsloth:
        if unsloth is None:
            return leave_out_training(f"no unsloth: {no_unsloth}")
        return train_all_by_unsloth()
    model = make()
    for batch, context in job["decode"]:
        what = f"batch {batch} at {context}"
        measured(what, decode, model, batch, context, job["tokens"])
    for tokens in job["prefill"]:
        measured(f"a prompt of {tokens}", prefill, model, tokens)
    if job["train"]:
        train_all(model, peft, no_peft)


main()
