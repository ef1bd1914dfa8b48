"""bitsandbytes' CPU library, called through ctypes: NF4 with plain scales, blocks of 64.

usage: peer_cpu.py JOB     by `cargo bench -- --cpu-peer libbitsandbytes_cpu.so`
JOB is JSON: library, shape, dtype, and a folder with the files codes, scales and decoded.
Prints {"same": whether it decodes to our bits}; then, for each line on standard input, the
microseconds of some calls as a list. Needs no packages.
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


def main():
    job = json.loads(sys.argv[1])
    rows, columns = job["shape"]
    elems = rows * columns
    names = {"f32": ("fp32", 4), "f16": ("fp16", 2), "bf16": ("bf16", 2)}
    dtype, size = names[job["dtype"]]
    try:
        library = ctypes.CDLL(job["library"])
        function = getattr(library, f"cdequantize_blockwise_cpu_nf4_{dtype}")
    except (OSError, AttributeError) as error:
        say({"missing": str(error)})
        return
    function.restype = None
    folder = job["folder"]
    _codes, codes = buffer(elems // 2, f"{folder}/codes")
    _scales, scales = buffer(elems // BLOCK_SIZE * 4, f"{folder}/scales")
    out, decoded = buffer(elems * size)
    arguments = (
        codes,
        scales,
        decoded,
        ctypes.c_longlong(BLOCK_SIZE),
        ctypes.c_longlong(rows),
        ctypes.c_longlong(columns),
    )
    function(*arguments)
    with open(f"{folder}/decoded", "rb") as file:
        say({"same": file.read() == out[:]})
    for _ in sys.stdin:
        function(*arguments)
        times = []
        for _ in range(CALLS):
            started = time.perf_counter()
            function(*arguments)
            times.append((time.perf_counter() - started) * 1e6)
        say(times)


main()
