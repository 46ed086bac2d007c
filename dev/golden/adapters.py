"""Adapters (LoRA) from and to PEFT.

    python dev/golden/adapters.py write          # PEFT -> cake
    python dev/golden/adapters.py accept ROOT    # cake -> PEFT

write   saves adapters of the models test/golden/hf_NAME as test/golden/peft_NAME/ and, beside each,
        what PEFT computes with them: peft_NAME.safetensors with tokens (n) and the logits (V) that
        follow the last.
accept  loads the directories ROOT/NAME that test_sft writes when CAKE_INTERCHANGE=ROOT: every tensor
        finds its place, and the logits are those in ROOT/NAME.logits, raw float32, that cake
        computed. Then test/golden/peft_written.json records what they hold; the test compares with
        that.
"""

import argparse
import json
import os
import shutil
import sys

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file

sys.dont_write_bytecode = True
from common import ids, signed

GOLDEN = "test/golden"
# Every matrix; and two of seven, which is how PEFT's users often begin.
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "qwen3": ["q_proj", "down_proj"]}


def base(name):
    return transformers.AutoModelForCausalLM.from_pretrained(
        os.path.join(GOLDEN, "hf_" + name), dtype=torch.float64, attn_implementation="sdpa").eval()


def prompt(name, model):
    return ids(f"peft_{name}.prompt", 11, model.config.vocab_size)


@torch.no_grad()
def last_logits(model, tokens):
    return model(torch.tensor(tokens)[None]).logits[0, -1].numpy()


def write():
    for name, targets in TARGETS.items():
        path = os.path.join(GOLDEN, "peft_" + name)
        shutil.rmtree(path, ignore_errors=True)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, bias="none",
                                 task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
        model = peft.get_peft_model(base(name), config, autocast_adapter_dtype=False)
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.data = torch.from_numpy(signed(key, p.numel())).reshape(p.shape).double() / 2
        tokens = prompt(name, model)
        logits = last_logits(model.eval(), tokens)
        plain = last_logits(base(name), tokens)
        model.float().save_pretrained(path)
        os.remove(os.path.join(path, "README.md"))
        save_file({"tokens": tokens.astype(np.float32), "logits": logits.astype(np.float32)},
                  path + ".safetensors")
        off = np.linalg.norm(logits - plain) / np.linalg.norm(plain)
        print(path, {f: os.path.getsize(os.path.join(path, f)) for f in sorted(os.listdir(path))},
              f"{off:.2f} from the base's logits")


def accept(root):
    record = {}
    for name in TARGETS:
        path = os.path.join(root, name)
        stored = load_file(os.path.join(path, "adapter_model.safetensors"))
        model = peft.PeftModel.from_pretrained(base(name), path, autocast_adapter_dtype=False)
        loaded = peft.get_peft_model_state_dict(model)
        if set(stored) != set(loaded):
            sys.exit(f"error: {path}: found {set(stored) ^ set(loaded)} on one side alone")
        for key, value in stored.items():
            if not np.array_equal(loaded[key].double().numpy(), value.astype(np.float64)):
                sys.exit(f"error: {path}: {key}: found other values after loading")
        expected = last_logits(model.double().eval(), prompt(name, model))
        found = np.fromfile(path + ".logits", np.float32).astype(np.float64)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        print(f"{path}: relative error {error:.1e}")
        if not error < 1e-5:  # float32 sums against float64
            sys.exit(f"error: {path}: found logits that differ by {error:.1e}")
        with open(os.path.join(path, "adapter_config.json")) as file:
            config = json.load(file)
        del config["base_model_name_or_path"]
        record[name] = dict(config=config, tensors={k: v.shape for k, v in sorted(stored.items())})
    with open(os.path.join(GOLDEN, "peft_written.json"), "w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    print("wrote", file.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write")
    commands.add_parser("accept").add_argument("root")
    a = parser.parse_args()
    write() if a.command == "write" else accept(a.root)


if __name__ == "__main__":
    main()
