#!/usr/bin/env python3
"""Reads a GGUF file of ours with the package gguf: every key and every tensor.

    dev/interop/gguf_check.py FILE.gguf [DIR]

Alone: the keys that llama.cpp's loader asks for, with the integer types it asks for; as many tokens
as rows of token_embd, all of them different; no key and no tensor that the architecture does not
have. With DIR, the Hugging Face directory that FILE was exported from: shapes and keys are those of
config.json; the bytes of every tensor are those that the package's own quantize() makes of the
directory's values, bit for bit (f32, f16, bf16, q8_0, q4_0); and how far the stored values are from
the directory's. Needs numpy and gguf.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, quants

from safetensors_file import read_safetensors

U32, F32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
TEXT, BOOL, ARRAY = GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.ARRAY

failures = []


def expect(good, *message):
    if not good:
        failures.append(" ".join(str(m) for m in message))


def values_of(reader):
    """Key -> (type, value), where the type of an array is that of its elements."""
    out = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            out[name] = (field.types, field.contents())
    return out


def architecture_keys(config, arch):
    """What config.json says, as keys of the file: name -> (type, value)."""
    g = arch == "gpt2"
    get = config.get
    heads = get("n_head" if g else "num_attention_heads")
    width = get("n_embd" if g else "hidden_size")
    rope = get("rope_parameters") or get("rope_scaling") or {}
    keys = {
        "context_length": (U32, get("n_positions" if g else "max_position_embeddings")),
        "embedding_length": (U32, width),
        "block_count": (U32, get("n_layer" if g else "num_hidden_layers")),
        "feed_forward_length": (U32, (get("n_inner") or 4 * width) if g
                                else get("intermediate_size")),
        "attention.head_count": (U32, heads),
    }
    if g:
        return keys | {"attention.layer_norm_epsilon": (F32, get("layer_norm_epsilon", 1e-5))}
    size = get("head_dim") or (width // heads if heads else None)
    return keys | {
        "attention.layer_norm_rms_epsilon": (F32, get("rms_norm_eps", 1e-6)),
        "attention.head_count_kv": (U32, get("num_key_value_heads") or heads),
        "attention.key_length": (U32, size),
        "attention.value_length": (U32, size),
        "rope.dimension_count": (U32, size),
        "rope.freq_base": (F32, get("rope_theta") or rope.get("rope_theta", 10000.0)),
    }


def check_keys(keys, reader, config):
    arch = keys["general.architecture"][1]
    for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"):
        expect(name in keys and keys[name][0] == [TEXT], name, "is missing or no string")
    expect(keys["tokenizer.ggml.model"][1] == "gpt2", "tokenizer.ggml.model is not gpt2")
    quantized = any(t.tensor_type not in (Type.F32, Type.F16, Type.BF16) for t in reader.tensors)
    if quantized:
        expect(keys.get("general.quantization_version") == ([U32], 2),
               "general.quantization_version: found", keys.get("general.quantization_version"))
    wanted = architecture_keys(config or {}, arch)
    for name, (kind, value) in wanted.items():
        found = keys.get(f"{arch}.{name}")
        expect(found is not None, f"{arch}.{name} is missing")
        if found is None:
            continue
        expect(found[0] == [kind], f"{arch}.{name}: found type {found[0]}, expected {kind}")
        if config:
            same = found[1] == value or (kind == F32 and np.float32(found[1]) == np.float32(value))
            expect(same, f"{arch}.{name}: found {found[1]}, expected {value}")
    tokens = keys["tokenizer.ggml.tokens"][1]
    rows = next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1]
    expect(len(tokens) == rows, f"found {len(tokens)} tokens for {rows} rows of token_embd")
    expect(len(set(tokens)) == len(tokens), "tokens: found a text twice")
    types = keys["tokenizer.ggml.token_type"]
    expect(types[0] == [ARRAY, GGUFValueType.INT32] and len(types[1]) == len(tokens),
           "tokenizer.ggml.token_type: found", types[0], len(types[1]))
    known = set(tokens)
    for merge in keys.get("tokenizer.ggml.merges", ([], []))[1]:
        left, _, right = merge.partition(" ")
        expect(left in known and right in known and left + right in known,
               f"merge {merge!r}: a part is no token")
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        expect(key in keys and keys[key][0] == [U32] and keys[key][1] < len(tokens),
               key, "is missing or out of range: llama.cpp takes 11")
    expect(keys.get("tokenizer.ggml.add_bos_token", ([], 0))[0] == [BOOL],
           "tokenizer.ggml.add_bos_token is missing: its default depends on the pre-tokenizer")
    template = keys.get("tokenizer.chat_template", ([], ""))[1]
    expect("generation %}" not in template and "generation -%}" not in template,
           "tokenizer.chat_template has a generation block")


def interleaved(w, heads):
    """llama's q and k: rows i and i + half of a head become 2i and 2i + 1."""
    out = w.shape[0]
    return w.reshape(heads, 2, out // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def expected_tensors(config, arch, t):
    """Name in the file -> the directory's values, (out, in)."""
    out = {}
    if arch == "gpt2":
        root = "" if "wte.weight" in t else "transformer."
        names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
        parts = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
                 "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        for name, value in t.items():
            name = name.removeprefix(root)
            stem, _, kind = name.rpartition(".")
            if stem in names:
                out[f"{names[stem]}.{kind}"] = value
            elif stem.startswith("h."):
                _, i, part = stem.split(".", 2)
                conv = kind == "weight" and value.ndim == 2
                out[f"blk.{i}.{parts[part]}.{kind}"] = value.T if conv else value
            elif stem == "lm_head":
                out["output.weight"] = value
    else:
        names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
                 "lm_head": "output"}
        parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
                 "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
                 "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
                 "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
                 "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
        heads = config["num_attention_heads"]
        for name, value in t.items():
            stem, _, kind = name.rpartition(".")
            if stem in names:
                out[f"{names[stem]}.{kind}"] = value
                continue
            _, _, i, part = stem.split(".", 3)
            if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                kv = config.get("num_key_value_heads") or heads
                value = interleaved(value, heads if part == "self_attn.q_proj" else kv)
            out[f"blk.{i}.{parts[part]}.{kind}"] = value
    if config.get("tie_word_embeddings", arch == "gpt2"):
        out.pop("output.weight", None)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "llama3":
        out["rope_freqs.weight"] = llama3_divisors(config, rope)
    return out


def llama3_divisors(config, rope):
    """What llama3's rule divides each frequency by (transformers, modeling_rope_utils.py)."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_theta") or rope["rope_theta"]
    wavelength = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def check_tensors(reader, config, arch, directory):
    expected = expected_tensors(config, arch, read_safetensors(directory))
    found = {t.name: t for t in reader.tensors}
    for name in found.keys() ^ expected.keys():
        expect(False, f"tensor {name}: only in the",
               "file" if name in found else "directory")
    rows = {}
    for name in found.keys() & expected.keys():
        t, values = found[name], np.ascontiguousarray(expected[name], np.float32)
        shape = tuple(int(n) for n in reversed(t.shape))
        if name == "token_embd.weight" and shape[0] > values.shape[0]:
            values = np.concatenate([values, np.zeros((shape[0] - len(values), shape[1]), "f4")])
        if shape != values.shape:
            expect(False, f"{name}: found shape {shape}, expected {values.shape}")
            continue
        kind = t.tensor_type
        stored = quants.dequantize(t.data, kind).reshape(shape)
        if name == "rope_freqs.weight":
            error = np.abs(stored / values - 1).max()
            expect(error < 1e-6, f"{name}: differs by {error:.1e} of its values")
        else:
            wanted = quants.quantize(values, kind).tobytes()
            expect(t.data.tobytes() == wanted, f"{name}: its {kind.name} bytes are not gguf's")
        scale = float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
        error = float(np.sqrt(np.mean((stored.astype(np.float64) - values) ** 2)))
        count, size, worst = rows.get(kind.name, (0, 0, 0.0))
        rows[kind.name] = (count + 1, size + t.n_bytes, max(worst, error / (scale or 1)))
    for kind, (count, size, worst) in sorted(rows.items()):
        print(f"  {kind:5} {count:4} tensors, {size:12,} bytes, values within {worst:.2e}, "
              "root mean square over that of the tensor")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("directory", type=pathlib.Path, nargs="?")
    o = parser.parse_args()
    reader = GGUFReader(o.file)
    keys = values_of(reader)
    arch = keys["general.architecture"][1]
    print(f"{o.file}: {arch}, {len(keys)} keys, {len(reader.tensors)} tensors, "
          f"pre {keys['tokenizer.ggml.pre'][1]}")
    config = json.loads((o.directory / "config.json").read_text()) if o.directory else None
    check_keys(keys, reader, config)
    if o.directory:
        check_tensors(reader, config, arch, o.directory)
    else:
        for t in reader.tensors:
            values = quants.dequantize(t.data, t.tensor_type)
            expect(np.isfinite(values).all(), f"{t.name}: found values that are not finite")
    for f in failures:
        print(f"{o.file}: {f}", file=sys.stderr)
    if failures:
        return 1
    print("  every key and tensor as expected")


if __name__ == "__main__":
    sys.exit(main())
