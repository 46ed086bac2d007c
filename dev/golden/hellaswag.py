#!/usr/bin/env python3
"""Writes test/golden/hellaswag.jsonl.gz: 200 made items of HellaSwag, with lm-evaluation-harness's texts.

    pip install --no-deps lm-eval==0.4.13
    python dev/golden/hellaswag.py [--out test/golden]

Each line is an item in HellaSwag's format, and under "harness" what lm-eval's own process_docs
(lm_eval/tasks/hellaswag/utils.py) makes of it. The items are random words among everything that the
function is about: marks in brackets, brackets that do not match, doubled spaces, white space at the
ends, curly quotes, and capitals of many scripts. All characters are older than Unicode 14, so that
no Python since 3.11 writes another file. Nothing is downloaded.
"""

import argparse
import gzip
import importlib.util
import json
import pathlib
import random
import sys
import types

ITEMS = 200
WORDS = ("the a man woman then puts his ball into it's \u201cfine\u201d \u2018so\u2019 don\u2019t \"quoted\" 12 "
         "3.5 caf\u00e9 \u00dcBER \u00c9TUDE stra\u00dfe STRASSE \u0130stanbul I\u0130I \u039f\u0394\u039f\u03a3 \u03a3\u039f\u03a6\u039f\u03a3 "
         "\u03a3 A\u03a3\u2019\u03a3. \u041c\u041e\u0421\u041a\u0412\u0410 \u0419\u043e\u0434 \u01c4ep \u01c6EP \ufb01SH \ufb03X "
         "\u0531\u0550 \u0587X \u10d0\u10d1 \u1c90\u1c91 \u0149T \u01f0X \u1f80\u1f88 \u1fb3\u1fbc \u1e9e \u00b5M \u017fX \u00aaX "
         "\u2160\u2171 \u24b6\u24d1 \U00010400\U00010428 \u65e5\u672c \U0001f98a e\u0301 E\u0301 NASA O'NEIL McDonald "
         "\\frac C:\\new a_b").split()
MARKS = ["[header]", "[title]", "[step]", "[substeps]", " [title]", " [title] ", "[ title ]", "[a [b] c]",
         "[", "]", "[]", "[two\nlines]", "[\u00c9]", "[[title]]", "] [", "[title"]
SPACES = [" "] * 12 + ["  ", "   ", "    ", "\t", "\n", " \n ", "\u00a0", "\u2003", ""]
ENDS = [""] * 6 + [" ", "  ", "\n", "\t", "\u00a0", "\u3000", "\x1f", "."]


def text(rng, low, high):
    out = rng.choice(ENDS)
    for _ in range(rng.randint(low, high)):
        out += rng.choice(MARKS if rng.random() < .25 else WORDS) + rng.choice(SPACES)
    return out + rng.choice(ENDS)


def load_utils():
    """lm_eval.tasks.hellaswag.utils, without lm_eval's requirements: of datasets it needs a name."""
    root = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    sys.modules.setdefault("datasets", types.SimpleNamespace(Dataset=None))
    path = pathlib.Path(root) / "tasks/hellaswag/utils.py"
    spec = importlib.util.spec_from_file_location("hellaswag_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Items(list):
    def map(self, function):
        return [function(item) for item in self]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path("test/golden"))
    out = args.parse_args().out
    rng = random.Random(1)
    items = Items()
    for i in range(ITEMS):  # a letter at least in every context and ending, so that it can be scored
        items.append(dict(activity_label=text(rng, 1, 3) or "x", ctx_a="A" + text(rng, 0, 8),
                          ctx_b="" if i % 4 == 0 else text(rng, 1, 5),
                          endings=["B" + text(rng, 0, 6) for _ in range(4)], label=rng.randrange(4)))
    lines = [json.dumps({**item, "harness": texts}, ensure_ascii=False) + "\n"
             for item, texts in zip(items, load_utils().process_docs(items))]
    data = gzip.compress("".join(lines).encode(), 9, mtime=0)
    (out / "hellaswag.jsonl.gz").write_bytes(data)
    print(f"{len(lines)} items, {len(data)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
