"""Loads a folder with transformers and bitsandbytes, and compares its logits with stored ones.

usage: peer_load.py FOLDER [--adapter FOLDER] [--io FILE] [--device cuda] [--max-difference X]
FILE is safetensors with `input_ids` and `logits`. Prints JSON: how many linear layers came up in
4 bit, and the largest absolute difference of the logits. Exits with 1 if that is over X, or if
anything is not finite. Needs torch, transformers, accelerate, bitsandbytes, and peft for an
adapter.
"""

import argparse
import json
import sys

import torch
import transformers
from safetensors.torch import load_file


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--adapter")
    parser.add_argument("--io")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-difference", type=float, default=float("inf"))
    arguments = parser.parse_args()

    config = transformers.AutoConfig.from_pretrained(arguments.folder)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.folder,
        device_map={"": arguments.device},
        dtype=config.dtype,
        # Soft caps are applied by no other.
        attn_implementation="eager",
        output_loading_info=True,
    )
    problems = {
        kind: sorted(map(str, keys))
        for kind, keys in loading.items()
        if kind.endswith("keys") and keys
    }
    quantized = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
        and getattr(module.weight, "quant_state", None) is not None
    ]
    if arguments.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter)
    model.eval()

    stored = load_file(arguments.io) if arguments.io else {}
    ids = stored.get("input_ids", torch.arange(1, 17).reshape(1, -1))
    with torch.no_grad():
        logits = model(ids.to(arguments.device)).logits.float().cpu()
    result = {
        "transformers": transformers.__version__,
        "dtype": str(config.dtype),
        "quantized_layers": len(quantized),
        "keys_at_fault": problems,
        "finite": bool(logits.isfinite().all()),
        "logits_rms": logits.square().mean().sqrt().item(),
    }
    difference = 0.0
    if "logits" in stored:
        difference = (logits - stored["logits"].float()).abs().max().item()
        result["max_abs_difference"] = difference
    print(json.dumps(result))
    good = result["finite"] and not problems and difference <= arguments.max_difference
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
