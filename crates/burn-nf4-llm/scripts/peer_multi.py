"""QLoRA steps of peft with bitsandbytes on several devices: what users would pick instead of `finetune --devices`.

    python3 peer_multi.py single
    python3 -m torch.distributed.run --nproc_per_node 2 peer_multi.py ddp
    python3 -m torch.distributed.run --nproc_per_node 2 peer_multi.py fsdp

single   one device
ddp      a whole model a device, gradients of the branches summed by DistributedDataParallel
fsdp     each decoder layer a unit of FSDP2 (`fully_shard`), codes stored as bfloat16 as
         `bnb_4bit_quant_storage` has them; embeddings and head are the root's unit
fsdp1    the same with FullyShardedDataParallel and `use_orig_params`; it wants branches in bfloat16

A Llama with random weights, by default of the sizes of Llama-3.1-8B, which no checkpoint is needed for: NF4 with
double quantization but for the head, computed in bfloat16; peft's branches on all seven projections; each layer
computed twice (gradient checkpointing); AdamW of PyTorch. Layers are made, quantized and sharded one after the
other, so that no device holds more than its share and a layer.

Prints one JSON object: `ms` is the median of the timed steps, each as long as on the slowest device, `tokens_s` is
of one device, `peak_bytes` the most that PyTorch's allocator held in those steps, a device each, `live_bytes` what
it holds between them. A device that runs out of memory says so ("failed"), and the exit status is 1.
"""
import argparse
import gc
import json
import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import peft
import torch
import torch.distributed as dist
import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", choices=["single", "ddp", "fsdp", "fsdp1"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    for name, default in [
        ("rows", 4),
        ("tokens", 2048),
        ("steps", 5),
        ("rank", 16),
        ("layers", 32),
        ("hidden", 4096),
        ("intermediate", 14336),
        ("heads", 32),
        ("kv-heads", 8),
        ("vocabulary", 128256),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--branches", choices=["float32", "bfloat16"], default=None)
    given = parser.parse_args()
    if given.branches is None:
        given.branches = "bfloat16" if given.mode == "fsdp1" else "float32"
    return given


def emit(what, **fields):
    print(json.dumps({"what": what, **fields}), flush=True)


def config_of(a):
    return transformers.LlamaConfig(
        vocab_size=a.vocabulary,
        hidden_size=a.hidden,
        intermediate_size=a.intermediate,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
    )


def in_4_bit(linear, storage, device):
    settings = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": storage}
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            **settings,
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, module=layer, **settings
    )
    return layer.to(device)


def quantized_layer(config, index, a, device):
    """A decoder layer in 4 bit, with branches."""
    sharded = a.mode.startswith("fsdp")
    storage = torch.bfloat16 if sharded else torch.uint8
    torch.manual_seed(index)
    with torch.device(device):
        layer = LlamaDecoderLayer(config, index).to(torch.bfloat16)
    layer.requires_grad_(False)
    for name, module in list(layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer.set_submodule(name, in_4_bit(module, storage, device))
    # peft then takes its layer for bitsandbytes.
    layer.is_loaded_in_4bit = True
    lora = peft.LoraConfig(
        r=a.rank, lora_alpha=2 * a.rank, lora_dropout=0.0, target_modules="all-linear"
    )
    # "all-linear" needs a whole model.
    lora.target_modules = {
        name.split(".")[-1]
        for name, module in layer.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    layer = peft.inject_adapter_in_model(lora, layer)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(device, getattr(torch, a.branches))
    return layer


def model_of(a, device, mesh):
    config = config_of(a)
    config.num_hidden_layers = 0
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    config = model.config
    config.num_hidden_layers = a.layers
    layers = model.model.layers
    for index in range(a.layers):
        layer = quantized_layer(config, index, a, device)
        if a.mode == "fsdp":
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        elif a.mode == "fsdp1":
            layer = fsdp1(layer, device)
        layers.append(layer)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if a.mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    if a.mode == "fsdp":
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    return fsdp1(model, device) if a.mode == "fsdp1" else model


def fsdp1(module, device):
    wrap = torch.distributed.fsdp.FullyShardedDataParallel
    return wrap(module, device_id=device, use_orig_params=True, limit_all_gathers=True)


def local(tensor):
    """What of a parameter is on this device."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def train(a, model, device, synchronize):
    """Times and losses of the steps, and the bytes that are live between them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    torch.manual_seed(1000 + (dist.get_rank() if dist.is_initialized() else 0))
    ids = torch.randint(3, a.vocabulary, (a.rows, a.tokens), device=device)
    times, losses, live = [], [], None
    for step in range(a.steps + 2):
        # The first two make the moments and warm it up.
        if step == 2:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                live = torch.cuda.memory_allocated()
        if dist.is_initialized():
            dist.barrier()
        synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    if not all(torch.isfinite(torch.tensor(losses))):
        raise ValueError(f"the losses are {losses}")
    if losses[-1] >= losses[0]:
        # The same rows again and again.
        raise ValueError(f"the losses do not fall: {losses}")
    return times[2:], losses, live


def gathered(value):
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run(a, device, mesh, synchronize):
    start = time.perf_counter()
    model = model_of(a, device, mesh)
    synchronize()
    seconds = time.perf_counter() - start
    if a.mode == "ddp":
        differ = [local(parameter).float().sum().item() for parameter in model.parameters()]
        if any(other != differ for other in gathered(differ)):
            raise ValueError("the replicas differ")
    held = sum(local(p).numel() * p.element_size() for p in model.parameters())
    times, losses, live = train(a, model, device, synchronize)
    times = [max(column) for column in zip(*gathered(times))]
    ms = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    fields = {
        "mode": a.mode,
        "devices": dist.get_world_size() if dist.is_initialized() else 1,
        "layers": a.layers,
        "hidden": a.hidden,
        "rows": a.rows,
        "tokens": a.tokens,
        "branches": a.branches,
        "ms": round(ms, 2),
        "tokens_s": round(a.rows * a.tokens / ms * 1e3, 1),
        "times_ms": [round(time, 2) for time in times],
        "parameter_bytes": gathered(held),
        "live_bytes": gathered(live),
        "peak_bytes": gathered(peak),
        "losses": gathered([round(loss, 5) for loss in losses]),
        "make_s": round(seconds, 1),
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        modules = (transformers, peft, bitsandbytes, torch)
        fields["versions"] = ", ".join(f"{m.__name__} {m.__version__}" for m in modules)
        fields["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        emit("multi", **fields)


def main():
    a = arguments()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    several = a.mode != "single"
    if several and "WORLD_SIZE" not in os.environ:
        sys.exit(f"{a.mode} is to be started by python3 -m torch.distributed.run")
    cuda = a.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = None
    if several:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        mesh = dist.device_mesh.init_device_mesh(a.device, (dist.get_world_size(),))
    try:
        run(a, device, mesh, torch.cuda.synchronize if cuda else lambda: None)
    except torch.OutOfMemoryError as error:
        emit("failed", mode=a.mode, device=rank, why=str(error).splitlines()[0])
        # The others wait in a collective; torch.distributed.run ends them.
        os._exit(1)
    if several:
        dist.destroy_process_group()


main()
