"""PyTorch's attention for benches/attention.rs: causal, bf16, by its flash and its cuDNN back end.

usage: peer_attention.py BATCH,HEADS,KV_HEADS,QUERIES,KEYS,HEAD_DIM...
Prints one JSON object a line: medians of device time, in microseconds, the backward pass through autograd.
"""
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROTATION_BYTES = 256 << 20
BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}


def median(run, launches):
    for _ in range(2):
        run()
    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def graph_of(run):
    """What `run` launches, without Python in between."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def times(batch, heads, kv_heads, queries, keys, head_dim):
    def tensor(heads, tokens):
        shape = (batch, tokens, heads, head_dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    decodes = queries < 16
    key_bytes = 2 * batch * keys * kv_heads * head_dim * 2
    copies = min(16, max(1, ROTATION_BYTES // key_bytes)) if decodes else 1
    sets = [(tensor(heads, queries), tensor(kv_heads, keys), tensor(kv_heads, keys)) for _ in range(copies)]
    grad = tensor(heads, queries)
    # PyTorch aligns a causal mask at the top left; one query sees all.
    causal = queries == keys

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)

    launches = max(copies, 8 if queries < 100000 else 1)

    def forward():
        with torch.no_grad():
            for i in range(launches):
                attend(*sets[i % copies])

    result = {"forward_us": median(graph_of(forward), launches)}
    if not decodes:
        leaves = [x.detach().requires_grad_() for x in sets[0]]

        def both():
            for _ in range(launches):
                torch.autograd.grad(attend(*leaves), leaves, grad)

        result["both_us"] = median(both, launches)
    return result


def main():
    print(json.dumps({"note": f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"}))
    for index, sizes in enumerate(sys.argv[1:]):
        sizes = [int(size) for size in sizes.split(",")]
        if 1 < sizes[3] < 16:
            continue
        for who, backend in BACKENDS.items():
            try:
                with sdpa_kernel(backend):
                    row = times(*sizes)
            except RuntimeError as error:
                print(json.dumps({"note": f"{who}, {sizes}: {str(error).splitlines()[0]}"}), flush=True)
                continue
            print(json.dumps({"case": index, "who": who, **row}), flush=True)


if __name__ == "__main__":
    main()
