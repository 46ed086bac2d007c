#!/usr/bin/env python3
"""Decoding one row, ours beside llama.cpp: tokens a second, in turns, in one run.

    dev/bench/decode_llama.py DIR [--rounds 3] [--threads 2]

DIR holds smollm2-f32.gguf, smollm2-bf16.gguf and smollm2-q8_0.gguf, as dev/interop/smollm2.py leaves
them. Both programs decode one row behind a short prompt, with a cache in f32, after 16 tokens of
warm-up. A round times each file in both, one after the other; printed are the medians of the
rounds, and their ratio. llama.cpp is the library of the package xllamacpp, or LLAMA_LIBRARY; the
first line says which instructions it was built for: pip's is built for AVX2. Beside it stands a
build of ours with MARCH=x86-64-v3, given with --logits.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "interop"))
import llama

PROMPT = [504, 3575, 282, 4649, 314]


def ours(o, path):
    request = json.dumps({"ids": PROMPT, "decode": o.tokens})
    out = subprocess.run([o.logits, str(path), "--weights", "auto", "--threads", str(o.threads)],
                         input=request, text=True, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(out)["tokens_per_second"]


def theirs(o, path):
    with llama.Llama(path, threads=o.threads) as m:
        return m.speed(o.tokens, prompt=PROMPT)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--types", nargs="+", default=["f32", "bf16", "q8_0"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logits", default="build/logits")
    o = parser.parse_args()
    times = {kind: ([], []) for kind in o.types}
    for _ in range(o.rounds):
        for kind in o.types:
            path = o.dir / f"smollm2-{kind}.gguf"
            times[kind][0].append(ours(o, path))
            times[kind][1].append(theirs(o, path))
    print(llama.Llama.library.llama_print_system_info().decode())
    print(f"{'tokens/s':<8} {'ours':>8} {'llama.cpp':>10} {'ratio':>7}")
    for kind, (a, b) in times.items():
        x, y = statistics.median(a), statistics.median(b)
        print(f"{kind:<8} {x:8.1f} {y:10.1f} {x / y:7.2f}   "
              f"(ours {min(a):.1f} to {max(a):.1f}, llama.cpp {min(b):.1f} to {max(b):.1f})")


if __name__ == "__main__":
    main()
