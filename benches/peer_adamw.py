"""The optimizers that others use, over the tensors of benches/adamw.rs: the factors of rank 16 of the seven
projections of a Llama of 8B, 448 tensors, 42 million parameters in f32.

usage: peer_adamw.py [--device cuda] [--layers 32] [--rounds 10]

Prints one JSON object a line: for each optimizer the medians of a step, in milliseconds: `host_ms` until the last
call has returned and `all_ms` until the device is done, of a step alone and (`clipped_`) of one with its clipping to
a norm of 1, as ours has it; and the bytes of its state. What is not there is told ("missing"), and what breaks too
("failed").
"""
import argparse
import json
import statistics
import time

RANK = 16
RATE = 1e-4
DECAY = 0.01
# Inputs and outputs of the projections of a layer.
# fmt: off
PROJECTIONS = [
    (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096),
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


def parameters(torch, layers, device):
    """Each 0.5, with a gradient of 0.01."""
    shapes = [
        shape for inputs, outputs in PROJECTIONS for shape in ((RANK, inputs), (outputs, RANK))
    ]
    made = []
    for shape in shapes * layers:
        parameter = torch.nn.Parameter(torch.full(shape, 0.5, device=device))
        parameter.grad = torch.full_like(parameter, 0.01)
        made.append(parameter)
    return made


def state_bytes(torch, optimizer):
    """Of all tensors of the state, maps of codes that parameters share once."""
    tensors = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                tensors[value.data_ptr()] = value.numel() * value.element_size()
    return sum(tensors.values())


def timed(run, synchronize):
    synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    synchronize()
    return host * 1e3, (time.perf_counter() - start) * 1e3


def measure(torch, name, make, arguments):
    device = arguments.device
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    made = parameters(torch, arguments.layers, device)
    optimizer = make(made)

    def clipped():
        torch.nn.utils.clip_grad_norm_(made, 1.0)
        optimizer.step()

    def median(run):
        # The first one makes the state, or compiles.
        times = [timed(run, synchronize) for _ in range(arguments.rounds + 1)][1:]
        return (round(statistics.median(column), 3) for column in zip(*times))

    host, all_ = median(optimizer.step)
    clipped_host, clipped_all = median(clipped)
    # With equal gradients a step is the rate, and the decay, whatever the gradients' size.
    expected = 0.5 - 2 * (arguments.rounds + 1) * RATE * (1 + DECAY * 0.5)
    given = made[0].flatten()[0].item()
    if abs(given - expected) > 1e-3:
        raise ValueError(f"{name} came to {given}, not to {expected}")
    say(
        "adamw",
        name=name,
        tensors=len(made),
        parameters=sum(parameter.numel() for parameter in made),
        host_ms=host,
        all_ms=all_,
        clipped_host_ms=clipped_host,
        clipped_all_ms=clipped_all,
        state_bytes=state_bytes(torch, optimizer),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch = load("torch")
    if torch is None:
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        say("missing", package="a GPU for torch", error="torch.cuda.is_available() is False")
        return
    bnb = load("bitsandbytes")
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    version = bnb.__version__ if bnb else "none"
    say("hello", torch=torch.__version__, bitsandbytes=version, device=card)
    settings = {"lr": RATE, "weight_decay": DECAY}
    optimizers = {
        "torch AdamW(fused=True)": lambda made: torch.optim.AdamW(made, fused=True, **settings),
        "torch AdamW": lambda made: torch.optim.AdamW(made, **settings),
    }
    if bnb:
        optimizers["bitsandbytes AdamW8bit"] = lambda made: bnb.optim.AdamW8bit(made, **settings)
        optimizers["bitsandbytes PagedAdamW8bit"] = lambda made: bnb.optim.PagedAdamW8bit(
            made, **settings
        )
    for name, make in optimizers.items():
        try:
            measure(torch, name, make, arguments)
        except Exception as error:  # one that fails must not end the others
            say("failed", name=name, error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
