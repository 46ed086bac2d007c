#!/usr/bin/env python3
"""The tokenizer beside gigatoken, tiktoken and tokenizers: the same texts, in turn, in one run.

    make bench-bpe PEER=python TEXT=file [MORE="c=file zh=file"]

PEER: a python with gigatoken, tiktoken and tokenizers. TEXT: a large text; MORE: further ones. Rows:

    cold   the first pass of a process, vocabulary loaded. Ours: ./bpe encode, from the first read to
           the last synced shard. Theirs: the first call, on bytes in memory.
    warm   the same text again in the same process, ids into memory.
    load   a vocabulary from its file.
    train  32,768 tokens, with the peak of memory.

Each figure is the median of three rounds; a round runs all programs one after the other, so that all
see the same machine. MB/s are 10^6 bytes of text. The result goes to build/bench_tokenizer.json too."""
import argparse
import importlib.metadata
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time

VOCABULARIES = ["r50k", "cl100k", "o200k", "qwen2"]
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PEERS = ["gigatoken", "tiktoken", "tokenizers"]
SMALL = 4_000_000  # bytes of the text that the slow peers get


# -------------------------------------------------------------------------------------------------
# A process of its own for each peer: prints a JSON list of seconds, one for each pass.

def tiktoken_encoding(path):
    import tiktoken
    model = json.load(open(path))
    byte_of = {}
    other = 256
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174:
            byte_of[chr(b)] = b
        else:
            byte_of[chr(other)] = b
            other += 1
    added = {t["content"] for t in model["added_tokens"]}
    ranks = {bytes(byte_of[c] for c in token): rank
             for token, rank in model["model"]["vocab"].items() if token not in added}
    steps = model["pre_tokenizer"].get("pretokenizers", [model["pre_tokenizer"]])
    regex = [s["pattern"]["Regex"] for s in steps if s["type"] == "Split"]
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("x", pat_str=regex[0] if regex else gpt2, mergeable_ranks=ranks,
                             special_tokens={})


def peer_main(peer, mode, path, text, passes):
    if mode == "train":
        import gigatoken
        begin = time.perf_counter()
        gigatoken.train_bpe(gigatoken.TextFileSource([text]), 32768, ["<|endoftext|>"])
        return print(json.dumps([time.perf_counter() - begin]))
    begin = time.perf_counter()
    if peer == "gigatoken":
        import gigatoken
        begin = time.perf_counter()
        encode = gigatoken.Tokenizer(path).encode
    elif peer == "tiktoken":
        encoding = tiktoken_encoding(path)
        encode = encoding._core_bpe.encode_ordinary
    else:
        import tokenizers
        begin = time.perf_counter()
        tokenizer = tokenizers.Tokenizer.from_file(path)
        encode = tokenizer.encode
    if mode == "load":
        return print(json.dumps([time.perf_counter() - begin]))
    data = open(text, "rb").read()
    if peer != "gigatoken":
        data = data.decode(errors="replace")
    seconds = []
    for _ in range(passes):
        begin = time.perf_counter()
        encode(data)
        seconds.append(time.perf_counter() - begin)
    print(json.dumps(seconds))


# -------------------------------------------------------------------------------------------------
# Runs

class Bench:
    def __init__(self, options):
        self.options = options
        self.rows = []

    def run(self, command, cores):
        """-> what it prints, the peak of its memory in MB"""
        before = {int(c) for c in os.sched_getaffinity(0)}
        chosen = ",".join(str(c) for c in sorted(before)[-cores:])
        process = subprocess.Popen(["taskset", "-c", chosen, *map(str, command)],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(map(str, command))}: {output[-2000:]}")
        return output, usage.ru_maxrss / 1024

    def peer(self, peer, mode, path, text="-", passes=1, cores=1):
        output, memory = self.run([sys.executable, os.path.abspath(__file__), "--peer", peer, mode, path,
                                   text, passes], cores)
        return json.loads(output.splitlines()[-1]), memory

    def ours(self, path, text, passes, cores):
        output, _ = self.run([self.options.bench, "encode", path, text, passes, cores], cores)
        return [json.loads(line)["seconds"] for line in output.splitlines()]

    def ours_whole(self, path, text, cores):
        """Seconds from the first read to the last synced shard, as ./bpe encode prints."""
        prefix = os.path.join(self.options.work, "shards", "x")
        shutil.rmtree(os.path.dirname(prefix), ignore_errors=True)
        os.makedirs(os.path.dirname(prefix))
        output, _ = self.run([self.options.bpe, "encode", path, text, "-o", prefix,
                              "--val-fraction", 0, "--threads", cores], cores)
        return os.path.getsize(text) / 1e6 / float(re.findall(r"([\d.,]+) MB/s", output)[-1].replace(",", ""))

    def add(self, task, text, cores, name, values, unit):
        row = dict(task=task, text=text, cores=cores, name=name, value=statistics.median(values),
                   values=values, unit=unit)
        self.rows.append(row)
        return row

    def encode(self, vocabulary, name, text, cores, peers):
        size = os.path.getsize(text) / 1e6
        path = os.path.join(self.options.work, vocabulary, "tokenizer.json")
        figures = {}
        for _ in range(self.options.rounds):
            for peer in peers:
                seconds, _ = self.peer(peer, "encode", path, text, 3, cores)
                figures.setdefault((peer, "cold"), []).append(size / seconds[0])
                figures.setdefault((peer, "warm"), []).append(size / min(seconds[1:]))
            seconds = self.ours(path, text, 3, cores)
            figures.setdefault(("cake", "warm"), []).append(size / min(seconds[1:]))
            figures.setdefault(("cake", "in memory"), []).append(size / seconds[0])
            figures.setdefault(("cake", "cold"), []).append(size / self.ours_whole(path, text, cores))
        for (who, task), values in figures.items():
            self.add(f"{vocabulary} {task}", name, cores, who, values, "MB/s")
        median = {key: statistics.median(values) for key, values in figures.items()}
        line = f"{vocabulary:7} {name:8} {cores} core{'s' if cores > 1 else ' '}"
        for task in ["cold", "warm"]:
            mine = median["cake", task]
            others = [f"{p} {median[p, task]:7.1f} ({mine / median[p, task]:.2f} times)" for p in peers]
            line += f"  {task}: cake {mine:7.1f}  " + "  ".join(others)
        print(line + f"  cold in memory: {median['cake', 'in memory']:.1f}", flush=True)

    def load(self, vocabulary):
        path = os.path.join(self.options.work, vocabulary, "tokenizer.json")
        ranks = os.path.join(self.options.data, f"{vocabulary}_base.tiktoken")
        figures = {}
        for _ in range(self.options.rounds):
            for peer in PEERS:
                figures.setdefault(peer, []).append(self.peer(peer, "load", path)[0][0])
            for kind, file in [("json", path), ("tiktoken", ranks)]:
                if os.path.exists(file):
                    output, _ = self.run([self.options.bench, "load", file], 1)
                    figures.setdefault(f"cake {kind}", []).append(json.loads(output)["seconds"])
        for who, values in figures.items():
            self.add(f"{vocabulary} load", "-", 1, who, values, "s")
        print(f"{vocabulary:7} load  " + "  ".join(
            f"{who} {1e3 * statistics.median(v):.0f} ms" for who, v in figures.items()), flush=True)

    def train(self, text, cores):
        figures = {}
        for _ in range(self.options.rounds):
            seconds, memory = self.peer("gigatoken", "train", "-", text, 1, cores)
            figures.setdefault("gigatoken", []).append((seconds[0], memory))
            begin = time.perf_counter()
            _, memory = self.run([self.options.bpe, "train", text, "--vocab-size", 32768, "-o",
                                  os.path.join(self.options.work, "trained"), "--threads", cores], cores)
            figures.setdefault("cake", []).append((time.perf_counter() - begin, memory))
        for who, values in figures.items():
            seconds = self.add("train", "text", cores, who, [v[0] for v in values], "s")["value"]
            memory = self.add("train memory", "text", cores, who, [v[1] for v in values], "MB")["value"]
            print(f"train   {cores} cores  {who}: {seconds:.2f} s, {memory:.0f} MB", flush=True)


def prepare(options):
    """Each vocabulary as a tokenizer.json that all read; the texts that are hard."""
    os.makedirs(options.work, exist_ok=True)
    for vocabulary in VOCABULARIES[:3]:
        directory = os.path.join(options.work, vocabulary)
        if not os.path.exists(os.path.join(directory, "tokenizer.json")):
            subprocess.run([options.bpe, "convert",
                            os.path.join(options.data, f"{vocabulary}_base.tiktoken"), directory], check=True)
    model = json.load(open(os.path.join(options.work, "cl100k", "tokenizer.json")))
    for step in model["pre_tokenizer"]["pretokenizers"]:
        if step["type"] == "Split":
            step["pattern"]["Regex"] = QWEN2
    os.makedirs(os.path.join(options.work, "qwen2"), exist_ok=True)
    with open(os.path.join(options.work, "qwen2", "tokenizer.json"), "w") as file:
        json.dump(model, file, ensure_ascii=False)
    draw = random.Random(1)
    letters = b"abcdefghijklmnopqrstuvwxyz"
    hard = {
        "spaces": b" " * 1_000_000,
        "one a": b"a" * 1_000_000,
        "one ^": b"^" * 1_000_000,
        "letters": bytes(draw.choices(letters, k=1_000_000)),
        "words": b" ".join(bytes(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(600_000)),
        "bytes": bytes(draw.choices(range(1, 256), k=1_000_000)),  # a NUL is binary data for ./bpe encode
    }
    paths = {}
    for name, text in hard.items():
        paths[name] = os.path.join(options.work, name.replace(" ", "_") + ".txt")
        with open(paths[name], "wb") as file:
            file.write(text)
    small = os.path.join(options.work, "small.txt")
    with open(options.text, "rb") as source, open(small, "wb") as file:
        file.write(source.read(SMALL))
    return paths, small


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", help="a large text")
    parser.add_argument("--texts", nargs="*", default=[], help="further ones: NAME=FILE")
    parser.add_argument("--data", default="../shared/data/tokenizers", help="folder of .tiktoken files")
    parser.add_argument("--bpe", default="./bpe")
    parser.add_argument("--bench", default="build/bench_tokenizer")
    parser.add_argument("--work", default="build/tokenizers", help="folder for what the run needs")
    parser.add_argument("--json", default="build/bench_tokenizer.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["text", "texts", "hard", "slow", "load", "train"])
    options = parser.parse_args()
    bench = Bench(options)
    versions = {peer: importlib.metadata.version(peer) for peer in PEERS}
    print(", ".join(f"{peer} {version}" for peer, version in versions.items()), flush=True)
    hard, small = prepare(options)
    for vocabulary in VOCABULARIES:
        if "text" in options.only:
            for cores in [1, 2]:
                bench.encode(vocabulary, "text", options.text, cores, ["gigatoken"])
        if "texts" in options.only:
            for name, path in [t.split("=", 1) for t in options.texts]:
                bench.encode(vocabulary, name, path, 1, ["gigatoken"])
        if "hard" in options.only:
            for name, path in hard.items():
                bench.encode(vocabulary, name, path, 1, ["gigatoken"])
        if "slow" in options.only:
            bench.encode(vocabulary, "4 MB", small, 1, PEERS)
        if "load" in options.only:
            bench.load(vocabulary)
    if "train" in options.only:
        bench.train(options.text, 2)
    with open(options.json, "w") as file:
        json.dump({"versions": versions, "rows": bench.rows}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--peer":
        peer_main(*sys.argv[2:6], int(sys.argv[6]))
    else:
        main()
