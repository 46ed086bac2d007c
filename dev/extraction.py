#!/usr/bin/env python3
"""Trains and scores the classifier of blocks in corpus_extract.cpp, and writes cake/extract_model.h.

    dev/extraction.py score PAGES.jsonl[.zst]   five folds split by site: word F1 by kind of page
    dev/extraction.py train PAGES.jsonl[.zst]   trains on all pages, writes cake/extract_model.h
    dev/extraction.py check PAGES.jsonl[.zst]   C++ and LightGBM give the same probabilities (1e-5)

PAGES: the pages of WCXB (Murrough Foley 2026, CC BY 4.0): JSON lines with html, url, type, the page's
main_content, snippets `with` that must and `without` that must not be in it.
TOOL (environment): the path of dev/extraction_blocks.cpp's binary, build/extraction_blocks by default.
Blocks and features come from this binary, so that training sees what the C++ computes.
Needs: numpy, lightgbm, scikit-learn, rapidfuzz."""
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from urllib.parse import urlparse

import numpy as np

TOOL = os.environ.get("TOOL", "build/extraction_blocks")
HEADER = os.environ.get("HEADER", "cake/extract_model.h")
KINDS = "article documentation service forum collection listing product".split()
WORD = re.compile(r"\w+")
TREES, LEAVES, DEPTH = 250, 12, 5
PARAMETERS = dict(objective="binary", learning_rate=.1, min_data_in_leaf=60, feature_fraction=.3,
                  lambda_l2=5, bagging_fraction=.8, bagging_freq=1, num_leaves=LEAVES,
                  max_depth=DEPTH, num_threads=1, verbose=-1, seed=1, deterministic=True)


# ---- pages and what the C++ makes of them

def unpacked(path):
    """The path of a plain file: where the name ends in .zst, a copy in the temporary folder."""
    if not path.endswith(".zst"):
        return path
    name = hashlib.sha1(os.path.abspath(path).encode()).hexdigest()[:12]
    plain = os.path.join(tempfile.gettempdir(), f"pages_{name}.jsonl")
    if not os.path.exists(plain):
        subprocess.run(["zstd", "-dqf", path, "-o", plain], check=True)
    return plain


def read_pages(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def read_blocks(path, pages):
    """[(texts, features, probabilities)] of each page, from the binary."""
    out = os.path.join(tempfile.mkdtemp(), "blocks")
    subprocess.run([TOOL, "blocks", path, out], check=True)
    data = open(out, "rb").read()
    os.remove(out)
    result, at = [], 0
    for _ in pages:
        n, f = np.frombuffer(data, np.int32, 2, at)
        at += 8
        features = np.frombuffer(data, np.float32, n * f, at).reshape(n, f)
        at += 4 * n * f
        probabilities = np.frombuffer(data, np.float32, n, at)
        at += 4 * n
        texts = []
        for _ in range(n):
            size = int(np.frombuffer(data, np.int32, 1, at)[0])
            texts.append(data[at + 4:at + 4 + size].decode("utf-8", "replace"))
            at += 4 + size
        result.append((texts, features, probabilities))
    assert at == len(data), "the binary wrote other pages than these"
    return result


# ---- labels: a block is main text when half of its words are on the longest common subsequence of
# the page's words and the words of its main text

def label(texts, truth):
    """-> share of each block's words on the subsequence, share of its 3-word runs in the truth, words"""
    from rapidfuzz.distance import LCSseq
    truth = WORD.findall(truth.lower())
    words = [WORD.findall(t.lower()) for t in texts]
    number = {}
    page = [number.setdefault(w, len(number)) for ws in words for w in ws]
    main = [number.setdefault(w, len(number)) for w in truth]
    hit = np.zeros(len(page) + 1, np.int32)
    if len(page) * len(main) < 4e9:
        for op in LCSseq.opcodes(page, main):
            if op.tag == "equal":
                hit[op.src_start + 1:op.src_end + 1] = 1
    total = np.cumsum(hit)
    runs = {tuple(truth[i:i + 3]) for i in range(len(truth) - 2)}
    aligned, shared, at = [], [], 0
    for ws in words:
        n = len(ws)
        aligned.append((total[at + n] - total[at]) / n if n else 0.)
        at += n
        shared.append(sum(tuple(ws[i:i + 3]) in runs for i in range(n - 2)) / (n - 2) if n >= 6 else 0.)
    return np.array(aligned), np.array(shared), np.array([len(ws) for ws in words])


class Data:
    def __init__(self, path):
        self.path = unpacked(path)
        self.pages = read_pages(self.path)
        blocks = read_blocks(self.path, self.pages)
        self.X = np.vstack([b[1] for b in blocks])
        self.probabilities = np.concatenate([b[2] for b in blocks])
        self.sizes = np.array([len(b[0]) for b in blocks])
        labels = [label(b[0], p["main_content"]) for b, p in zip(blocks, self.pages)]
        aligned, shared, words = (np.concatenate(x) for x in zip(*labels))
        self.y = (aligned >= .5).astype(int)
        repeats = (self.y == 0) & (shared >= .7)  # in the truth, but another copy was aligned
        # A page's blocks weigh as the roots of their words, a page as if it had one size.
        w = np.minimum(words, 200).astype(float) ** .5
        begin = 0
        for n in self.sizes:
            s = slice(begin, begin + n)
            w[s] /= max(w[s].sum(), 1e-9) ** .5 * max((w[s] * self.y[s]).sum(), 1.) ** .5
            begin += n
        w[repeats] *= .2
        # Most pages are articles: rarer kinds weigh more, by the fourth root.
        kinds = Counter(p["type"] for p in self.pages)
        w *= np.repeat([kinds[p["type"]] ** -.25 for p in self.pages], self.sizes)
        self.weight = w / w.mean()
        self.page = np.repeat(np.arange(len(self.pages)), self.sizes)


def site(url):
    """The registered domain, about."""
    host = urlparse(url if "//" in url else "//" + url).netloc.lower().split(":")[0].split(".")
    second = ("co", "com", "org", "ac", "gov", "net", "edu")
    return ".".join(host[-(3 if len(host) > 2 and host[-2] in second and len(host[-1]) == 2 else 2):])


def folds(pages):
    from sklearn.model_selection import StratifiedGroupKFold
    fold = np.zeros(len(pages), int)
    split = StratifiedGroupKFold(5, shuffle=True, random_state=1)
    for k, (_, test) in enumerate(split.split(pages, [p["type"] for p in pages],
                                              [site(p["url"]) for p in pages])):
        fold[test] = k
    return fold


def train(data, rows):
    import lightgbm
    return lightgbm.train(PARAMETERS, lightgbm.Dataset(
        data.X[rows], data.y[rows], weight=data.weight[rows], params=dict(max_bin=63, verbose=-1)), TREES)


# ---- scores

def word_f1(text, truth):
    a, b = Counter(WORD.findall(text.lower())), Counter(WORD.findall(truth.lower()))
    shared = sum((a & b).values())
    if not shared:
        return 0., 0., 0.
    p, r = shared / sum(a.values()), shared / sum(b.values())
    return 2 * p * r / (p + r), p, r


def snippets(text, page):
    """-> wanted snippets that are there, wanted, unwanted that are not there, unwanted"""
    flat = lambda s: " ".join(s.split()).lower()
    text = flat(text)
    wanted, unwanted = page.get("with") or [], page.get("without") or []
    return (sum(flat(s) in text for s in wanted), len(wanted),
            sum(flat(s) not in text for s in unwanted), len(unwanted))


def report(name, pages, texts):
    scores = np.array([word_f1(t, p["main_content"]) for t, p in zip(texts, pages)])
    found = np.array([snippets(t, p) for t, p in zip(texts, pages)]).sum(0)
    kind = np.array([p["type"] for p in pages])
    print(f"{name:12} F1 {scores[:, 0].mean():.4f} |",
          " ".join(f"{k} {scores[kind == k, 0].mean():.3f}" for k in KINDS),
          f"| P {scores[:, 1].mean():.3f} R {scores[:, 2].mean():.3f}",
          f"with {found[0] / max(found[1], 1):.3f} without {found[2] / max(found[3], 1):.3f}", flush=True)
    return scores[:, 0]


def texts_of(path, mode="balanced", probabilities=None):
    folder = tempfile.mkdtemp()
    out, p = os.path.join(folder, "texts"), os.path.join(folder, "probabilities")
    command = [TOOL, "texts", path, out, mode]
    if probabilities is not None:
        probabilities.astype(np.float32).tofile(p)
        command.append(p)
    subprocess.run(command, check=True)
    with open(out) as lines:
        return [json.loads(line)["text"] for line in lines]


def held_out(data):
    """Probabilities of each page's blocks by a model that saw no page of its site."""
    fold = folds(data.pages)[data.page]
    p = np.zeros(len(data.y))
    for k in range(5):
        p[fold == k] = train(data, fold != k).predict(data.X[fold == k], num_threads=1)
        print(f"fold {k + 1} of 5: {np.sum(fold == k)} blocks", file=sys.stderr, flush=True)
    return p


def score(path):
    data = Data(path)
    print(f"{len(data.pages)} pages, {len(data.y)} blocks, {data.y.mean():.3f} of them main text")
    p = held_out(data)
    if "PROBABILITIES" in os.environ:
        p.astype(np.float32).tofile(os.environ["PROBABILITIES"])
    for mode in ("balanced", "precision", "recall"):
        report(mode, data.pages, texts_of(data.path, mode, p))
    report("rules", data.pages, texts_of(data.path, "rules"))
    report("all labels right", data.pages, texts_of(data.path, "balanced", data.y * .998 + .001))


# ---- the table

def float_below(x):
    """The largest float that is not above the double x: the same comparison for every float."""
    f = np.float32(x)
    return f if float(f) <= x else np.nextafter(f, np.float32(-np.inf))


def table(model):
    """-> splits (trees, LEAVES - 1) of (feature, threshold, left, right), leaves (trees, LEAVES)"""
    splits, leaves = [], []
    for tree in model.dump_model()["tree_info"]:
        rows, values = [], []

        def add(node):
            if "leaf_value" in node:
                values.append(node["leaf_value"])
                return -len(values)
            assert node["decision_type"] == "<="
            k = len(rows)
            rows.append([node["split_feature"], float_below(node["threshold"]), 0, 0])
            rows[k][2] = add(node["left_child"])
            rows[k][3] = add(node["right_child"])
            return k

        if add(tree["tree_structure"]) < 0:  # a tree of one leaf
            rows.append([0, np.float32(0), -1, -1])
        rows += [[0, np.float32(0), -1, -1]] * (LEAVES - 1 - len(rows))
        values += [0.] * (LEAVES - len(values))
        splits.append(rows)
        leaves.append(values)
    return splits, leaves


def number(x):
    s = f"{float(np.float32(x)):.9g}"
    return s + ("f" if "." in s or "e" in s else ".f")


def wrapped(items):
    lines, line = [], "   "
    for item in items:
        if len(line) + len(item) + 2 > 100:
            lines.append(line)
            line = "   "
        line += " " + item + ","
    return "\n".join(lines + [line])


def train_all(path):
    data = Data(path)
    model = train(data, np.ones(len(data.y), bool))
    splits, leaves = table(model)
    names = subprocess.run([TOOL, "names"], capture_output=True, text=True, check=True).stdout.split()
    assert len(names) == data.X.shape[1]
    settings = ", ".join(f"{k} {v}" for k, v in PARAMETERS.items() if k not in ("num_threads", "verbose"))
    settings = "\n// ".join(textwrap.wrap(settings + ".", 96))
    with open(HEADER, "w") as out:
        out.write(f"""// The classifier of blocks of corpus_extract.cpp: {TREES} boosted trees of at most {LEAVES} leaves.
// Written by dev/extraction.py. Trained on WCXB, Murrough Foley 2026, CC BY 4.0: {len(data.pages)} pages,
// {len(data.y)} blocks. LightGBM: {TREES} trees, max_bin 63,
// {settings}
#pragma once

#include <cstdint>

namespace cake::corpus {{

// Goes left where features[feature] <= threshold. left, right: a split of the same tree, or ~leaf.
struct ExtractSplit {{
  uint16_t feature;
  int8_t left, right;
  float threshold;
}};
inline constexpr int kExtractFeatures = {len(names)};
inline constexpr int kExtractTrees = {TREES}, kExtractLeavesOfTree = {LEAVES};

// clang-format off

inline constexpr ExtractSplit kExtractSplits[] = {{  // (trees, leaves - 1)
{wrapped("{%d,%d,%d,%s}" % (f, a, b, number(t)) for rows in splits for f, t, a, b in rows)}
}};

inline constexpr float kExtractLeaves[] = {{  // (trees, leaves)
{wrapped(number(v) for values in leaves for v in values)}
}};

// clang-format on

}}  // namespace cake::corpus
""")
    gain = model.feature_importance("gain")
    best = np.argsort(-gain)[:12]
    print(f"{HEADER}: {sum(len(r) for r in splits)} splits, {np.sum(gain > 0)} of {len(names)} features used;",
          "most gain:", ", ".join(f"{names[i]} {gain[i] / gain.sum():.3f}" for i in best))
    model.save_model(HEADER + ".lightgbm.txt" if "KEEP" in os.environ else os.devnull)


def check(path):
    """After the binary was built with the new table: a model trained again gives the same numbers."""
    data = Data(path)
    p = train(data, np.ones(len(data.y), bool)).predict(data.X, num_threads=1)
    worst = np.abs(p - data.probabilities).max()
    print(f"largest difference of a probability, C++ against LightGBM: {worst:.2g} over {len(p)} blocks")
    sys.exit(not worst < 1e-5)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("score", "train", "check"):
        sys.exit(__doc__)
    {"score": score, "train": train_all, "check": check}[sys.argv[1]](sys.argv[2])
