#!/usr/bin/env python3
"""Directories of ours in transformers: AutoModelForCausalLM.from_pretrained beside build/logits.

    dev/interop/transformers_check.py DIR ... [--logits build/logits]

Expected: transformers loads the model and its tokenizer, gives our ids for a text, log-probabilities
within 2e-4 in float32, and the same greedy text of 40 tokens. Needs torch and transformers.
"""

import argparse
import json
import subprocess
import sys

import torch
import transformers

TEXT = "First, you know that it was the 3rd of May; we'll see.\n  All: Let us go on."


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dirs", nargs="+")
    parser.add_argument("--logits", default="build/logits")
    o = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    for path in o.dirs:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        request = json.dumps({"text": TEXT, "logp": True, "greedy": 40})
        a = json.loads(subprocess.run([o.logits, path, "--threads", "1"], input=request, text=True,
                                      check=True, stdout=subprocess.PIPE).stdout)
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            error = max(abs(float(logp[i, t]) - x)
                        for i, (t, x) in enumerate(zip(ids[1:], a["logp"])))
            found = model.generate(torch.tensor([ids]), max_new_tokens=len(a["greedy"]),
                                   do_sample=False)[0, len(ids):].tolist()
        good = ids == a["ids"] and error <= 2e-4 and found == a["greedy"]
        bad += not good
        print(f"{path}: {type(model).__name__}: ids {'same' if ids == a['ids'] else 'differ'}, "
              f"log-probabilities within {error:.1e}, "
              f"greedy text {'same' if found == a['greedy'] else 'differs'}")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
