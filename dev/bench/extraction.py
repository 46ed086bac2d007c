#!/usr/bin/env python3
"""Extraction of main text beside trafilatura's: the same pages, the same run, one core.

    taskset -c 1 dev/bench/extraction.py PAGES.jsonl[.zst] [--shipped]

Word F1 of the C++ path comes from five models that saw no page of the site they are scored on (see
dev/extraction.py). --shipped: from the model in cake/extract_model.h; honest only on pages that it was
not trained on. Needs trafilatura and what dev/extraction.py needs."""
import os
import re
import subprocess
import sys
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import extraction


def peer(pages):
    """-> trafilatura's texts with its default options, seconds"""
    import trafilatura
    texts, seconds = [], 0
    for page in pages:
        begin = time.process_time()
        texts.append(trafilatura.extract(page["html"]) or "")
        seconds += time.process_time() - begin
    return texts, seconds


def main():
    shipped = "--shipped" in sys.argv
    paths = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(paths) != 1:
        sys.exit(__doc__)
    path = extraction.unpacked(paths[0])
    pages = extraction.read_pages(path)
    size = sum(len(p["html"].encode()) for p in pages)
    peer_texts, seconds = peer(pages)
    import trafilatura
    print("trafilatura", trafilatura.__version__)
    theirs = extraction.report("trafilatura", pages, peer_texts)
    if shipped:
        probabilities = None
    elif "PROBABILITIES" in os.environ:  # that `dev/extraction.py score` wrote
        probabilities = np.fromfile(os.environ["PROBABILITIES"], np.float32)
    else:
        data = extraction.Data(path)
        probabilities = extraction.held_out(data)
    ours = extraction.report("cake", pages, extraction.texts_of(path, "balanced", probabilities))
    difference = ours - theirs
    draw = np.random.RandomState(0)
    n = len(pages)
    means = [difference[draw.randint(0, n, n)].mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    print(f"cake - trafilatura: {difference.mean():+.4f} (95 % interval {low:+.4f} to {high:+.4f});",
          f"better by more than .02 on {np.sum(difference > .02)} pages,",
          f"worse on {np.sum(difference < -.02)}")
    print(f"trafilatura: {n / seconds:.1f} pages/s, {size / seconds / 1e6:.1f} MB/s of HTML")
    line = subprocess.run([extraction.TOOL, "time", path], capture_output=True, text=True, check=True)
    print("cake:", line.stdout.strip())
    rate = float(re.search(r"([\d.]+) pages/s", line.stdout).group(1))
    print(f"cake is {rate * seconds / n:.1f} times as fast")


if __name__ == "__main__":
    main()
