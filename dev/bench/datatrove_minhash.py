"""Near-duplicate documents: ./corpus dedup beside datatrove's MinHash, on the same documents.

    python dev/bench/datatrove_minhash.py FILE.jsonl... [--copies N] [--corpus ./corpus]

The documents are pieces of 100 to 400 words of the files' "text". For each of N of them, an edited
copy is added in which up to 8 % of the words are replaced. Both programs run on one core with 14
bands of 8 hashes of 5-grams of words. Needs datatrove, spacy and orjson from pip. Prints a JSON line
for each figure, {"name", "value", "unit"}:

    datatrove.seconds, cake.seconds   processor time: signatures, bands, clusters, filter
    datatrove.found.S, cake.found.S   share of copies dropped whose Jaccard similarity is about S
    theory.found.S                    the same by theory: the mean of 1 - (1 - s^8)^14
    agree                             share of documents of which both say the same
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import tempfile


def pieces(paths, rng):
    for path in paths:
        for line in open(path, encoding="utf-8"):
            words = re.findall(r"[a-z]+", json.loads(line)["text"].lower())
            while len(words) >= 100:
                n = rng.randint(100, 400)
                yield words[:n]
                words = words[n:]


def jaccard(a, b):
    a, b = ({tuple(x[i : i + 5]) for i in range(len(x) - 4)} for x in (a, b))
    return len(a & b) / len(a | b)


def make_documents(paths, copies):
    """[(words, similarity to the document before, or None)], the copies behind their originals"""
    rng = random.Random(1)
    originals = list(pieces(paths, rng))
    vocabulary = sorted({w for words in originals for w in words})
    copied = set(rng.sample(range(len(originals)), min(copies, len(originals))))
    documents = []
    for i, words in enumerate(originals):
        documents.append((words, None))
        if i in copied:
            share = 0.08 * rng.random()
            edited = [rng.choice(vocabulary) if rng.random() < share else w for w in words]
            documents.append((edited, jaccard(words, edited)))
    return documents


def kept_by_datatrove(source, work):
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    folder = lambda name: os.path.join(work, name)
    reader = lambda: JsonlReader(os.path.dirname(source), glob_pattern=os.path.basename(source))
    kept = folder("kept")
    writer = JsonlWriter(kept, output_filename="${rank}.jsonl", compression=None)
    steps = [
        ([reader(), MinhashDedupSignature(output_folder=folder("signatures"), config=config)], 1),
        ([MinhashDedupBuckets(folder("signatures"), folder("buckets"), config=config)], 14),
        ([MinhashDedupCluster(folder("buckets"), folder("remove"), config=config)], 1),
        ([reader(), MinhashDedupFilter(folder("remove")), writer], 1),
    ]
    for i, (pipeline, tasks) in enumerate(steps):
        LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=1, logging_dir=folder(f"logs{i}"), skip_completed=False
        ).run()
    lines = open(os.path.join(kept, "00000.jsonl"), encoding="utf-8")
    return {int(json.loads(line)["id"]) for line in lines}


def kept_by_cake(source, work, corpus):
    out = os.path.join(work, "cake")
    command = [corpus, "dedup", source, "-o", out, "--threads", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    text = subprocess.run(
        ["zstd", "-dc", os.path.join(out, "documents.jsonl.zst")], check=True, capture_output=True
    ).stdout.decode()
    return {int(json.loads(line)["id"]) for line in text.splitlines()}


def processor_time():  # of this process and those it waited for
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--copies", type=int, default=1500)
    parser.add_argument("--corpus", default="./corpus")
    args = parser.parse_args()
    work = tempfile.mkdtemp()
    documents = make_documents(args.files, args.copies)
    source = os.path.join(work, "documents.jsonl")
    with open(source, "w", encoding="utf-8") as file:
        for i, (words, _) in enumerate(documents):
            file.write(json.dumps({"text": " ".join(words), "id": str(i)}) + "\n")

    def figure(name, value, unit):
        print(json.dumps({"name": name, "value": round(value, 4), "unit": unit}), flush=True)

    figure("documents", len(documents), "documents")
    figure("bytes", os.path.getsize(source), "bytes")
    kept = {}
    for name, run in (
        ("cake", lambda: kept_by_cake(source, work, args.corpus)),
        ("datatrove", lambda: kept_by_datatrove(source, work)),
    ):
        begin = processor_time()
        kept[name] = run()
        figure(f"{name}.seconds", processor_time() - begin, "s")
        originals = [i for i, (_, similarity) in enumerate(documents) if similarity is None]
        lost = sum(i not in kept[name] for i in originals)
        figure(f"{name}.originals_dropped", lost, "documents")
    for low, high in ((0, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        found = [i for i, (_, s) in enumerate(documents) if s is not None and low <= s < high]
        if not found:
            continue
        label = f"found.{low:.1f}-{min(high, 1):.1f}"
        for name in kept:
            figure(f"{name}.{label}", sum(i not in kept[name] for i in found) / len(found), "share")
        theory = sum(1 - (1 - documents[i][1] ** 8) ** 14 for i in found) / len(found)
        figure(f"theory.{label}", theory, f"share of {len(found)}")
    same = sum((i in kept["cake"]) == (i in kept["datatrove"]) for i in range(len(documents)))
    figure("agree", same / len(documents), "share")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
