#!/usr/bin/env python3
"""stories260K, a real model of 260,000 parameters in llama2.c's format, through cake and llama.cpp.

    dev/interop/stories260k.py stories260K.bin tok512.bin DIR

It writes DIR/model, a Hugging Face directory, and checks that

- build/logits DIR/model gives the 40 known ids, and the known logits behind the first token;
- ./chat export makes GGUF files of it: attn_q and attn_k hold the bytes of the .bin again (both
  have interleaved RoPE; the directory has the halves side by side), and with --type q8_0, ffn_down
  is F16, since its rows of 172 values are not whole blocks;
- build/logits gives the same from the GGUF file, and llama.cpp the same 40 ids from it.

Needs numpy, gguf and xllamacpp. The format of the .bin: seven int32 (dim, hidden, layers, heads, kv
heads, vocabulary, context), then floats, each tensor for all layers.
"""

import argparse
import json
import pathlib
import struct
import subprocess
import sys

import numpy as np

import llama
from safetensors_file import write_safetensors

KNOWN_IDS = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401,
             396, 267, 337, 410, 408, 419, 292, 411, 322, 265, 282, 295, 433, 426, 385, 328, 432,
             358, 394, 261, 370, 432, 352]
KNOWN_LOGITS = [-6.22291, 8.40434, -6.22374, -6.22254, -6.22195, -6.22288]  # behind BOS, ids 0 to 5


def read_bin(path):
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", data[:28])
    head = dim // heads
    floats = np.frombuffer(data, "<f4", offset=28)
    shapes = {"token_embd": (vocab, dim), "attn_norm": (layers, dim),
              "attn_q": (layers, dim, dim), "attn_k": (layers, kv_heads * head, dim),
              "attn_v": (layers, kv_heads * head, dim), "attn_output": (layers, dim, dim),
              "ffn_norm": (layers, dim), "ffn_gate": (layers, hidden, dim),
              "ffn_down": (layers, dim, hidden), "ffn_up": (layers, hidden, dim),
              "output_norm": (dim,)}
    tensors, begin = {}, 0
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        tensors[name] = floats[begin:begin + n].reshape(shape)
        begin += n
    assert begin + context * head == len(floats), f"{path}: found {len(floats)} floats"
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim,
              "intermediate_size": hidden, "num_hidden_layers": layers,
              "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
              "vocab_size": vocab, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1,
              "eos_token_id": 2, "hidden_act": "silu"}
    return config, tensors


def halves(w, heads):
    """Rows in Hugging Face's order: pairs (2i, 2i + 1) of a head become (i, i + half)."""
    out, width = w.shape
    return w.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def write_directory(out, config, t):
    tensors = {"model.embed_tokens.weight": t["token_embd"], "model.norm.weight": t["output_norm"]}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": t["attn_norm"][i],
            p + "self_attn.q_proj.weight": halves(t["attn_q"][i], config["num_attention_heads"]),
            p + "self_attn.k_proj.weight": halves(t["attn_k"][i], config["num_key_value_heads"]),
            p + "self_attn.v_proj.weight": t["attn_v"][i],
            p + "self_attn.o_proj.weight": t["attn_output"][i],
            p + "post_attention_layernorm.weight": t["ffn_norm"][i],
            p + "mlp.gate_proj.weight": t["ffn_gate"][i],
            p + "mlp.up_proj.weight": t["ffn_up"][i],
            p + "mlp.down_proj.weight": t["ffn_down"][i]}
    write_safetensors(out / "model.safetensors", tensors)
    (out / "config.json").write_text(json.dumps(config, indent=2))


def byte_alphabet():
    """GPT-2's: byte -> character."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) if b in plain else chr(256 + [x for x in range(256) if x not in plain].index(b))
            for b in range(256)}


def write_tokenizer(out, path):
    """The SentencePiece vocabulary as byte-level BPE with the same ids: it decodes the same, which
    is all that is needed here. A byte that is a piece too keeps its name <0x..> as a special
    token, since names are unique."""
    data = path.read_bytes()
    pieces, at = [], 4
    while at < len(data):
        score, n = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8:at + 8 + n], score))
        at += 8 + n
    alphabet = byte_alphabet()
    spell = lambda b: "".join(alphabet[x] for x in b)
    names = {spell(p): i for i, (p, _) in enumerate(pieces) if i >= 259}
    added = {0: "<unk>", 1: "<|endoftext|>", 2: "</s>"}
    for b in range(256):
        if alphabet[b] in names:
            added[3 + b] = f"<0x{b:02X}>"
        else:
            names[alphabet[b]] = 3 + b
    merges = [(score, a, b) for piece, score in pieces[259:] for i in range(1, len(piece))
              for a, b in [(spell(piece[:i]), spell(piece[i:]))] if a in names and b in names]
    merges = [[a, b] for _, a, b in sorted(merges, key=lambda m: -m[0])]
    tokens = [{"id": i, "content": text, "special": True, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False} for i, text in sorted(added.items())]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": names, "merges": merges}
    (out / "tokenizer.json").write_text(json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
         "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
         "decoder": byte_level, "model": model}, ensure_ascii=False, indent=1))
    (out / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>",
         "eos_token": "</s>", "model_max_length": 512}, indent=2))


def check_ours(model, logits):
    request = json.dumps({"ids": [1], "last": True, "greedy": 40})
    answer = json.loads(subprocess.run([logits, model], input=request, text=True, check=True,
                                       stdout=subprocess.PIPE).stdout)
    error = max(abs(a - b) for a, b in zip(answer["last"], KNOWN_LOGITS))
    assert error < 1e-4, f"{model}: found logits {answer['last'][:6]}, expected {KNOWN_LOGITS}"
    assert answer["greedy"] == KNOWN_IDS, f"{model}: found {answer['greedy']}, expected {KNOWN_IDS}"
    print(f"{model}: the 40 known ids; logits differ by {error:.1e} at most")
    print(" ", answer["greedy_text"])


def check_gguf(path, tensors, type_name):
    from gguf import GGUFReader
    found = {t.name: t for t in GGUFReader(path).tensors}
    for i in range(len(tensors["attn_q"])):
        for name in ("attn_q", "attn_k", "ffn_down"):
            t = found[f"blk.{i}.{name}.weight"]
            if type_name == "F32":
                assert t.data.tobytes() == tensors[name][i].tobytes(), f"{path}: {t.name} differs"
            expected = "F16" if (name, type_name) == ("ffn_down", "Q8_0") else type_name
            assert t.tensor_type.name == expected, f"{path}: {t.name}: found {t.tensor_type.name}"
    print(f"{path}: attn_q, attn_k, ffn_down: "
          + ("the bytes of the .bin" if type_name == "F32" else "Q8_0, Q8_0, F16"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bin", type=pathlib.Path)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--chat", default="./chat")
    parser.add_argument("--logits", default="build/logits")
    parser.add_argument("--only-convert", action="store_true", help="write DIR/model and stop")
    o = parser.parse_args()
    config, tensors = read_bin(o.bin)
    model = o.out / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_directory(model, config, tensors)
    write_tokenizer(model, o.tokens)
    if o.only_convert:
        return
    check_ours(str(model), o.logits)
    for kind in ("f32", "q8_0"):
        path = str(o.out / f"stories260K-{kind}.gguf")
        subprocess.run([o.chat, "export", str(model), "-o", path, "--type", kind], check=True)
        check_gguf(path, tensors, kind.upper())
        if kind == "f32":
            check_ours(path, o.logits)
            with llama.Llama(path, context=512) as m:
                ids, _ = m.greedy([1], 40)
                assert ids == KNOWN_IDS, f"llama.cpp: found {ids}, expected {KNOWN_IDS}"
                print(f"{path}: llama.cpp: the 40 known ids")


if __name__ == "__main__":
    sys.exit(main())
