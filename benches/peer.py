"""What users would pick instead, timed on the card on which ours was timed just before.

usage: peer.py JOBS     by `cargo bench -- --peer python3`
JOBS is a JSON file: "rotation_bytes" and "jobs", each naming files with a weight in its parts and
what it must decode to. Prints one JSON object a line, each with "what". A missing package is told
("missing") and its jobs are left out; a job that breaks is told ("failed").

Peers: bitsandbytes' dequantize_4bit, quantize_4bit and matmul_4bit; cuBLAS; the launches of Unsloth's fast_dequantize,
which are bitsandbytes' C entry points for the scales and for the codes with an addition of the
offset in between; and a Triton kernel that does all in one launch.
"""

import ctypes
import json
import statistics
import sys
import time

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
SAMPLES = 15
# fmt: off
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]
# fmt: on


def say(what, **fields):
    print(json.dumps({"what": what, **fields}), flush=True)


def load(package):
    """A module, or None once its absence has been told."""
    try:
        return __import__(package)
    except Exception as error:  # a broken installation raises all kinds
        say("missing", package=package, error=f"{type(error).__name__}: {error}"[:300])
        return None


torch = load("torch")
if torch is not None and not torch.cuda.is_available():
    say("missing", package="a GPU for torch", error="torch.cuda.is_available() is False")
    torch = None
bnb = load("bitsandbytes") if torch else None
triton = load("triton") if torch else None
if bnb:
    import bitsandbytes.functional as bnb_functional


def dtype_of(name):
    return {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[name]


def read(path, dtype, device="cuda"):
    with open(path, "rb") as file:
        data = bytearray(file.read())
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).to(device)


def same_bits(a, b):
    a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return bool(torch.equal(a, b))


class Weight:
    """A weight in its parts, on the card."""

    def __init__(self, files):
        self.shape = tuple(files["shape"])
        self.elems = self.shape[0] * self.shape[1]
        self.dtype = dtype_of(files["dtype"])
        self.codes = read(files["codes"], torch.uint8)
        self.scales = read(files["scales"], torch.uint8)
        self.nested_absmax = read(files["nested_absmax"], torch.float32)
        self.map = read(files["map"], torch.float32)
        self.offset = torch.tensor(files["offset"], dtype=torch.float32, device="cuda")
        self.table = torch.tensor(NF4, dtype=torch.float32, device="cuda")
        self.expected = files["decoded"]
        self.prepare()

    def prepare(self):
        self.state = None
        if bnb:
            nested = bnb_functional.QuantState(
                absmax=self.nested_absmax,
                code=self.map,
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
            self.state = bnb_functional.QuantState(
                absmax=self.scales,
                shape=torch.Size(self.shape),
                code=self.table,
                blocksize=BLOCK_SIZE,
                quant_type="nf4",
                dtype=self.dtype,
                offset=self.offset,
                state2=nested,
            )
            self.column = self.codes.view(-1, 1)

    def copy(self):
        """The same in other memory."""
        other = object.__new__(Weight)
        other.__dict__.update(self.__dict__)
        for name in ("codes", "scales", "nested_absmax"):
            setattr(other, name, getattr(self, name).clone())
        other.prepare()
        return other

    def empty(self):
        return torch.empty(self.shape, dtype=self.dtype, device="cuda")

    def empty_absmax(self):
        return torch.empty(self.scales.numel(), dtype=torch.float32, device="cuda")


class Bitsandbytes:
    package = bnb

    def scratch(self, weight):
        return None

    def __call__(self, weight, out=None, scratch=None):
        return bnb_functional.dequantize_4bit(weight.column, weight.state, out=out)


class TwoLaunch:
    """The launches of unsloth.kernels.utils.fast_dequantize."""

    package = bnb

    def __init__(self):
        library = bnb_functional.lib
        self.dequantize_absmax = library.cdequantize_blockwise_fp32
        self.dequantize_codes = {
            torch.float16: library.cdequantize_blockwise_fp16_nf4,
            torch.bfloat16: library.cdequantize_blockwise_bf16_nf4,
        }

    def scratch(self, weight):
        return weight.empty_absmax()

    def __call__(self, weight, out=None, scratch=None):
        pointer = ctypes.c_void_p
        stream = pointer(torch.cuda.current_stream().cuda_stream)
        if out is None:
            out = weight.empty()
            scratch = weight.empty_absmax()
        self.dequantize_absmax(
            pointer(weight.map.data_ptr()),
            pointer(weight.scales.data_ptr()),
            pointer(weight.nested_absmax.data_ptr()),
            pointer(scratch.data_ptr()),
            ctypes.c_int(NESTED_BLOCK_SIZE),
            ctypes.c_int(scratch.numel()),
            stream,
        )
        scratch += weight.offset
        self.dequantize_codes[out.dtype](
            None,
            pointer(weight.codes.data_ptr()),
            pointer(scratch.data_ptr()),
            pointer(out.data_ptr()),
            ctypes.c_int(BLOCK_SIZE),
            ctypes.c_int(out.numel()),
            stream,
        )
        return out


if triton:
    import triton.language as tl

    @triton.jit
    def dequantize_kernel(
        codes,
        scales,
        nested_absmax,
        map,
        offset,
        table,
        out,
        elems,
        BLOCKS: tl.constexpr,
        BLOCK_BYTES: tl.constexpr,
        NESTED: tl.constexpr,
    ):
        """A program decodes BLOCKS neighbouring blocks, and each block's scale once."""
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        is_block = block * (2 * BLOCK_BYTES) < elems
        code = tl.load(scales + block, mask=is_block, other=0).to(tl.int32)
        nested = tl.load(nested_absmax + block // NESTED, mask=is_block, other=0.0)
        absmax = tl.load(map + code) * nested + tl.load(offset)
        byte_at = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
        byte = tl.load(codes + byte_at, mask=byte_at * 2 < elems, other=0).to(tl.int32)
        high = tl.load(table + (byte >> 4)) * absmax[:, None]
        low = tl.load(table + (byte & 15)) * absmax[:, None]
        at = block[:, None] * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
        decoded = tl.interleave(high, low).to(out.dtype.element_ty)
        tl.store(out + at, decoded, mask=at < elems)


class Triton:
    """One launch of a straightforward kernel, at the best of a few sizes."""

    package = triton
    sizes = [(blocks, warps) for blocks in (16, 32, 64, 128) for warps in (4, 8)]

    def __init__(self):
        self.best = {}

    def scratch(self, weight):
        return None

    def launch(self, weight, out, size):
        blocks, warps = size
        grid = (-(-weight.scales.numel() // blocks),)
        dequantize_kernel[grid](
            weight.codes,
            weight.scales,
            weight.nested_absmax,
            weight.map,
            weight.offset,
            weight.table,
            out,
            weight.elems,
            BLOCKS=blocks,
            BLOCK_BYTES=BLOCK_SIZE // 2,
            NESTED=NESTED_BLOCK_SIZE,
            num_warps=warps,
            # The format rounds the product before it adds the offset.
            enable_fp_fusion=False,
        )

    def __call__(self, weight, out=None, scratch=None):
        if out is None:
            out = weight.empty()
        self.launch(weight, out, self.best[weight.shape, weight.dtype])
        return out

    def tune(self, weights, outs):
        """Measures which size is the fastest for a shape."""
        first = weights[0]
        if (first.shape, first.dtype) in self.best:
            return
        times = {}
        for size in self.sizes:
            calls = [lambda w=w, o=o, s=size: self.launch(w, o, s) for w, o in zip(weights, outs)]
            times[size] = device_time(calls, max(len(calls), 20), samples=5)["median_us"]
        self.best[first.shape, first.dtype] = min(times, key=times.get)
        blocks, warps = self.best[first.shape, first.dtype]
        shape = "x".join(map(str, first.shape))
        say("note", text=f"triton, {shape}: {blocks} blocks a program and {warps} warps are best")


def device_time(calls, launches, samples=SAMPLES):
    """Median, spread and best of a call's device time in microseconds, and how they were taken:
    replays of a CUDA graph, or where that cannot be captured launches queued behind a busy device."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()

    def run():
        for i in range(launches):
            calls[i % len(calls)]()

    method = "graph"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        execute = graph.replay
    except Exception:
        torch.cuda.synchronize()
        method, execute = "queued", run
    times = []
    for _ in range(samples + 2):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        if method == "queued":
            torch.cuda._sleep(20_000_000)
        start.record()
        execute()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / launches * 1e3)
    times = sorted(times[2:])
    return {
        "median_us": statistics.median(times),
        "spread_us": times[samples * 3 // 4] - times[samples // 4],
        "best_us": times[0],
        "method": method,
    }


def rotation(job, rotation_bytes):
    if job.get("hot"):
        return 1, max(rotation_bytes // job["bytes"], 20)
    copies = max(rotation_bytes // job["bytes"], 2)
    return copies, max(copies, 20)


class Cublas:
    """PyTorch's product with the dense weight."""

    package = torch


class Session:
    """Runs jobs and keeps the last weight, as neighbouring jobs share it."""

    def __init__(self, rotation_bytes):
        self.rotation_bytes = rotation_bytes
        self.peers = {}
        self.weights = (None, None, None)

    def peer(self, name):
        kinds = {
            "bitsandbytes": Bitsandbytes,
            "two_launch": TwoLaunch,
            "triton": Triton,
            "cublas": Cublas,
        }
        kind = kinds[name]
        if not kind.package:
            return None
        if name not in self.peers:
            self.peers[name] = kind()
        return self.peers[name]

    def rotated(self, files, copies):
        if self.weights[0] != files["codes"]:
            self.weights = (None, None, None)
            torch.cuda.empty_cache()
            first = Weight(files)
            weights = [first] + [first.copy() for _ in range(copies - 1)]
            self.weights = (files["codes"], weights, [weight.empty() for weight in weights])
        return self.weights[1][:copies], self.weights[2][:copies]

    def dequantize(self, job, peer):
        cold, _ = rotation({**job, "hot": False}, self.rotation_bytes)
        self.rotated(job["weight"], cold)
        copies, launches = rotation(job, self.rotation_bytes)
        weights, outs = self.rotated(job["weight"], copies)
        if isinstance(peer, Triton):
            peer.tune(*self.rotated(job["weight"], cold))
        outs[0].zero_()
        scratch = peer.scratch(weights[0])
        peer(weights[0], outs[0], scratch)
        same = same_bits(outs[0], read(weights[0].expected, weights[0].dtype))
        calls = [lambda w=w, o=o: peer(w, o, scratch) for w, o in zip(weights, outs)]
        say("time", name=job["name"], same=same, **device_time(calls, launches))

    def quantize(self, job, peer):
        copies, _ = rotation(job, self.rotation_bytes)
        dense = read(job["dense"], dtype_of(job["dtype"])).view(job["shape"])
        dense = [dense.clone() for _ in range(copies)]

        def call(weight):
            return bnb_functional.quantize_4bit(
                weight,
                blocksize=BLOCK_SIZE,
                compress_statistics=job["nested"],
                quant_type="nf4",
            )

        same = same_bits(call(dense[0])[0], read(job["codes"], torch.uint8))
        calls = [lambda w=w: call(w) for w in dense]
        say("time", name=job["name"], same=same, **device_time(calls, 8))

    def matmul(self, job, peer):
        """y = x W^T, or with "dx" x W, the gradient of the input: bitsandbytes' matmul_4bit and what
        its backward pass calls, or cuBLAS over the dense weight."""
        files, m, dx = job["weight"], job["m"], job["dx"]
        n, k = files["shape"]
        dtype = dtype_of(files["dtype"])
        copies = max(self.rotation_bytes // job["bytes"], 2)
        x = read(job["x"], dtype).view(m, n if dx else k)
        dense = read(files["decoded"], dtype).view(n, k)
        if isinstance(peer, Cublas):
            copies = max(self.rotation_bytes // (n * k * 2), 2)
            weights = [dense] + [dense.clone() for _ in range(copies - 1)]
            if dx:
                calls = [lambda w=w: x @ w for w in weights]
            else:
                calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
        else:
            copies = min(copies, 16)
            weights, _ = self.rotated(files, copies)
            if dx:
                calls = [
                    lambda w=w: x @ bnb_functional.dequantize_4bit(w.column, w.state).to(dtype)
                    for w in weights
                ]
            else:
                calls = [lambda w=w: bnb.matmul_4bit(x, w.column.t(), w.state) for w in weights]
        # Some rows, as f64 takes much memory.
        some = slice(0, min(m, 256))
        exact = x[some].double() @ (dense.double() if dx else dense.double().t())
        error = (calls[0]()[some].double() - exact).norm() / exact.norm()
        del exact
        say(
            "product",
            variant=job["as"],
            dtype=files["dtype"],
            shape=[n, k],
            m=m,
            relative_error=error.item(),
            **device_time(calls, copies),
        )

    def puzzle(self, job, peer):
        self.weights = (None, None, None)
        torch.cuda.empty_cache()
        seconds = []
        for files in job["models"]:
            weights = [Weight(file) for file in files]
            if isinstance(peer, Triton):
                for weight in weights:
                    peer.tune([weight], [weight.empty()])
            for _ in range(2):
                for i, weight in enumerate(weights):
                    out = peer(weight)
                    torch.cuda.synchronize()
                    if not same_bits(out, read(weight.expected, weight.dtype)):
                        raise AssertionError(f"weight {i} has other bits than ours")
            up, gate, down = weights
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(job["rounds"]):
                a = peer(up).t()
                torch.cuda.synchronize()
                b = peer(gate).t()
                torch.cuda.synchronize()
                c = peer(down).t()
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            del a, b, c
        say("puzzle", name=job["name"], seconds=seconds)


def copy_bandwidth():
    size = 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / device_time([lambda: target.copy_(source)], 5)["median_us"] / 1e3


def main():
    with open(sys.argv[1]) as file:
        manifest = json.load(file)
    if not torch:
        return
    versions = [f"Python {sys.version.split()[0]}", f"PyTorch {torch.__version__}"]
    versions += [f"bitsandbytes {bnb.__version__}"] if bnb else []
    versions += [f"Triton {triton.__version__}"] if triton else []
    say("hello", text=", ".join(versions) + f", on {torch.cuda.get_device_name()}")
    say("copy", gb_s=copy_bandwidth())
    session = Session(manifest["rotation_bytes"])
    for job in manifest["jobs"]:
        try:
            peer = session.peer(job["variant"])
            if peer:
                getattr(session, job["kind"])(job, peer)
        except Exception as error:
            say("failed", name=job["name"], error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
