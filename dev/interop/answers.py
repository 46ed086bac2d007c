#!/usr/bin/env python3
"""Answers of ./chat eval -o FILE.jsonl, asked again of llama.cpp with the exported model.

    dev/interop/answers.py MODEL.gguf ANSWERS.jsonl [--items 10]

The prompt of each line goes to llama.cpp as it is, and the text that follows must be the same. Where
it differs, the margin between llama.cpp's two best logits there says whether rounding explains it.
Needs numpy and xllamacpp.
"""

import argparse
import json
import sys

import llama


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("answers")
    parser.add_argument("--items", type=int, default=10)
    o = parser.parse_args()
    same, lines = 0, [json.loads(line) for line in open(o.answers, encoding="utf-8")][:o.items]
    with llama.Llama(o.model, context=1024) as m:
        for a in lines:
            # As many tokens as the answer has bytes are enough: each has one byte or more.
            limit = len(m.tokenize(a["answer"])) + 8
            ids, margins = m.greedy(m.tokenize(a["prompt"], special=True), limit)
            ended = m.ends(ids[-1])
            text = m.text(ids[:-1] if ended else ids)
            # An answer that was cut off at --max-tokens goes on in llama.cpp.
            good = text == a["answer"] if a["finish"] == "stop_token" else text.startswith(a["answer"])
            same += good
            if not good:
                print(f"{a['item']}: ours {a['answer']!r}, llama.cpp {text!r}, "
                      f"smallest margin of two logits {min(margins):.4f}")
    print(f"{o.model}: llama.cpp gives {same} of {len(lines)} answers with the same text")
    return same < len(lines)


if __name__ == "__main__":
    sys.exit(main())
