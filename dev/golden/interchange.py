"""Model directories from and to transformers.

    python dev/golden/interchange.py write                    # transformers -> cake
    python dev/golden/interchange.py check DIR IDS LOGITS     # cake -> transformers, any model
    python dev/golden/interchange.py accept ROOT              # cake -> transformers, the goldens

write   saves tiny models with save_pretrained as test/golden/hf_NAME/ and, beside each, what
        transformers computes when it loads them again: hf_NAME.safetensors with tokens (n) and
        logits (n, V), or value (n).
check   loads a directory that cake wrote and compares the logits of the prompt IDS ("1,2,3") with
        those in the file LOGITS (n, V), raw float32, that cake computed.
accept  checks the directories ROOT/NAME that test_goldens writes when CAKE_INTERCHANGE=ROOT: they
        load without a missing, unexpected or mismatched key, and compute exactly what the model
        with the formula's weights computes. Then test/golden/written.json records what they hold
        (config.json, and type, shape and hash of each tensor); the test compares with that.
"""

import argparse
import json
import os
import shutil
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

sys.dont_write_bytecode = True
from common import config, hash64, ids, make_model
from models import MODELS

GOLDEN = "test/golden"

# Each says something different on disk: fused and transposed tensors; shards with an index, F16 and
# a scaled RoPE; BF16; a score head.
WRITTEN_BY_TRANSFORMERS = {
    "gpt2": (config("gpt2", V=61, T=16, L=2, C=12, NH=3, tied=True, norm_eps=1e-5), "float32", {}),
    "llama": (config("llama", V=67, T=64, L=2, C=12, NH=4, NKV=2, HS=4, F=20, norm_eps=1e-5,
                     rope_theta=500.0, rope_factor=8.0, rope_original_T=16), "float16",
              dict(max_shard_size="3KB")),
    "qwen3": (config("qwen3", V=71, T=32, L=2, C=16, NH=3, NKV=1, HS=8, F=28, rope_theta=1e6),
              "bfloat16", {}),
    "qwen3_reward": (config("qwen3", head="scalar", V=37, T=32, L=1, C=8, NH=2, NKV=1, HS=8, F=12,
                            tied=True), "float32", {}),
}
WRITTEN_BY_CAKE = ["gpt2", "gpt2_untied", "llama", "llama3", "qwen3", "qwen2", "mistral",
                   "qwen3_scalar"]


def load(path):
    """(model in float64, whether its head is scalar); fails unless every key fits."""
    with open(os.path.join(path, "config.json")) as file:
        scalar = "SequenceClassification" in json.load(file)["architectures"][0]
    kind = transformers.AutoModelForSequenceClassification if scalar else (
        transformers.AutoModelForCausalLM)
    model, info = kind.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa",
                                       output_loading_info=True)
    bad = {k: v for k, v in info.items() if v}
    if bad:
        sys.exit(f"error: {path}: found {bad}, expected every key to fit")
    return model.eval(), scalar


@torch.no_grad()
def output(model, scalar, tokens):
    """Logits (n, V), or the scores of all positions (n)."""
    tokens = torch.tensor(np.asarray(tokens))[None]
    if not scalar:
        return model(tokens).logits[0].numpy()
    backbone = getattr(model, model.base_model_prefix)
    return model.score(backbone(tokens).last_hidden_state)[0, :, 0].numpy()


def write():
    for name, (c, dtype, options) in WRITTEN_BY_TRANSFORMERS.items():
        path = os.path.join(GOLDEN, "hf_" + name)
        shutil.rmtree(path, ignore_errors=True)
        model = make_model(c, getattr(torch, dtype))
        model.save_pretrained(path, **options)
        model, scalar = load(path)
        tokens = ids(name + ".prompt", 11, c["V"])
        result = output(model, scalar, tokens)
        save_file({"tokens": tokens.astype(np.float32),
                   "value" if scalar else "logits": result.astype(np.float32)},
                  path + ".safetensors")
        print(path, {f: os.path.getsize(os.path.join(path, f)) for f in sorted(os.listdir(path))})


def check(path, tokens, logits_file):
    model, scalar = load(path)
    expected = output(model, scalar, tokens)
    found = np.fromfile(logits_file, np.float32).astype(np.float64)
    if found.size != expected.size:
        sys.exit(f"error: {logits_file}: found {found.size} numbers, expected {expected.shape}")
    error = np.linalg.norm(found - expected.ravel()) / np.linalg.norm(expected)
    print(f"{path}: relative error {error:.1e}")
    if not error < 1e-5:  # float32 sums against float64
        sys.exit(f"error: {path}: found logits that differ by {error:.1e}, expected below 1e-5")


def accept(root):
    record = {}
    for name in WRITTEN_BY_CAKE:
        path, c = os.path.join(root, name), MODELS[name]["config"]
        tokens = ids(name + ".prompt", 11, c["V"])
        check(path, tokens, path + ".logits")
        model, scalar = load(path)
        reference = output(make_model(c).eval(), scalar, tokens)
        error = np.abs(output(model, scalar, tokens) - reference).max()
        if not error < 1e-12:
            sys.exit(f"error: {path}: found {error:.1e} off the formula's weights, expected 0")
        with open(os.path.join(path, "config.json")) as file:
            record[name] = dict(config=json.load(file), tensors={})
        with open(os.path.join(path, "model.safetensors"), "rb") as file:
            data = file.read()
        header_size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_size])
        for tensor, t in sorted(header.items()):
            if tensor != "__metadata__":
                a, b = t["data_offsets"]
                bits = int(hash64(data[8 + header_size + a : 8 + header_size + b]))
                record[name]["tensors"][tensor] = [t["dtype"], t["shape"], f"{bits:016x}"]
    with open(os.path.join(GOLDEN, "written.json"), "w") as file:
        models = ",\n".join(
            f'"{name}": {{\n"config": {json.dumps(r["config"])},\n"tensors": {{\n' + ",\n".join(
                f"{json.dumps(k)}: {json.dumps(v)}" for k, v in r["tensors"].items()) + "}}"
            for name, r in record.items())
        file.write("{" + models + "}\n")
    print("wrote", file.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write")
    command = commands.add_parser("check")
    command.add_argument("dir")
    command.add_argument("ids", help="comma-separated")
    command.add_argument("logits")
    command = commands.add_parser("accept")
    command.add_argument("root")
    a = parser.parse_args()
    if a.command == "write":
        write()
    elif a.command == "check":
        check(a.dir, [int(t) for t in a.ids.split(",")], a.logits)
    else:
        accept(a.root)


if __name__ == "__main__":
    main()
