"""bitsandbytes' CPU library, called through ctypes: NF4 with plain scales, blocks of 64.

usage: peer_cpu.py JOB     by `cargo bench -- --cpu-peer libbitsandbytes_cpu.so`
JOB is JSON, of kind "dequantize": library, shape, dtype, and a folder with the files codes, scales
and decoded. Prints {"same": whether it decodes to our bits}.
Of kind "matmul": library, shape, rows of x, and a folder with the files codes and scales, in the
library's own order, and x. Writes the file out and prints {}.
Then prints, for each line on standard input, the microseconds of some calls as a list. Needs no
packages.
"""

import ctypes
import json
import mmap
import sys
import time

BLOCK_SIZE = 64
CALLS = 3


def say(value):
    print(json.dumps(value), flush=True)


def buffer(size, path=None):
    """Memory at a page boundary, with a file's content."""
    memory = mmap.mmap(-1, size)
    if path:
        with open(path, "rb") as file:
            memory.write(file.read())
    return memory, (ctypes.c_char * size).from_buffer(memory)


def dequantize(job):
    """The function, its arguments, and what to do once it has been called."""
    rows, columns = job["shape"]
    elems = rows * columns
    names = {"f32": ("fp32", 4), "f16": ("fp16", 2), "bf16": ("bf16", 2)}
    dtype, size = names[job["dtype"]]
    library = ctypes.CDLL(job["library"])
    function = getattr(library, f"cdequantize_blockwise_cpu_nf4_{dtype}")
    folder = job["folder"]
    _, codes = buffer(elems // 2, f"{folder}/codes")
    _, scales = buffer(elems // BLOCK_SIZE * 4, f"{folder}/scales")
    out, decoded = buffer(elems * size)
    sizes = (BLOCK_SIZE, rows, columns)
    arguments = (codes, scales, decoded, *map(ctypes.c_longlong, sizes))

    def ready():
        with open(f"{folder}/decoded", "rb") as file:
            return {"same": file.read() == out[:]}

    return function, arguments, ready


def matmul(job):
    """As dequantize."""
    n, k = job["shape"]
    m = job["rows"]
    library = ctypes.CDLL(job["library"])
    function = library.gemv_4bit_inference_cpu_nf4_bf16
    if not library.has_avx512bf16_cpu():
        raise OSError("the library multiplies with AVX-512 BF16 only")
    folder = job["folder"]
    _, codes = buffer(n * k // 2, f"{folder}/codes")
    _, scales = buffer(n * k // BLOCK_SIZE * 2, f"{folder}/scales")
    _, x = buffer(m * k * 2, f"{folder}/x")
    out, y = buffer(m * n * 2)
    integer = ctypes.c_int64
    shape = map(integer, (m, n, k))
    strides = map(integer, (BLOCK_SIZE, k, n))
    arguments = (*shape, x, codes, scales, y, *strides)

    def ready():
        with open(f"{folder}/out", "wb") as file:
            file.write(out[:])
        return {}

    return function, arguments, ready


def main():
    job = json.loads(sys.argv[1])
    try:
        kinds = {"dequantize": dequantize, "matmul": matmul}
        function, arguments, ready = kinds[job["kind"]](job)
    except (OSError, AttributeError) as error:
        say({"missing": str(error)})
        return
    function.restype = None
    function(*arguments)
    say(ready())
    for _ in sys.stdin:
        function(*arguments)
        times = []
        for _ in range(CALLS):
            started = time.perf_counter()
            function(*arguments)
            times.append((time.perf_counter() - started) * 1e6)
        say(times)


main()
