#!/usr/bin/env python3
"""./serve under load: what goes through HTTP, beside ./chat generate and llama.cpp's server.

    dev/bench/serve.py [--demo runs/demo] [--gpt2 DIR] [--smollm2 FILE.gguf] [--peer PYTHON]
                       [--only WORDS] [--rounds 3] [--json FILE]

Needs ./serve, ./chat and build/serve_load (make bench-serve builds them), and at least two cores.
Without --gpt2, a model of GPT-2's shape (124M parameters) with one step of training is made in
build/bench_serve, from --texts. --peer is a Python with xllamacpp, whose llama.cpp then serves
--smollm2 beside ./serve: the same client, prompts and files.

Each line of the table is a measurement, what was measured, and the goal. Speeds are medians of
rounds in which both programs take turns; both write the same greedy texts, so both compute the
same. The client is pinned to the last core; "client" is the share of it that it used.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

WORK = pathlib.Path("build/bench_serve")
CPU = max(os.sched_getaffinity(0))
rows = []


def report(what, value, goal="", good=None):
    rows.append({"what": what, "value": value, "goal": goal, "good": good})
    mark = "" if good is None else "yes" if good else "NO"
    print(f"{what:<58} {value:>34}  {goal:<22} {mark}", flush=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(command, log):
    """A server on a free port, until the block ends: (port, pid)."""
    port = free_port()
    with open(log, "w") as out:
        process = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=out,
                                   stderr=out)
        try:
            for _ in range(1200):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    if process.poll() is not None:
                        sys.exit(f"error: {command[0]} has ended: {log}")
                    time.sleep(.1)
            yield port, process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def cake(o, model, rows, *more):
    return server([o.serve, model, "--rows", rows, *more], WORK / "serve.log")


def llama(o, model, rows, context):
    return server([o.peer, "dev/interop/llama.py", "serve", model, "--rows", rows, "--context",
                   context, "--threads", len(os.sched_getaffinity(0))], WORK / "llama.log")


def load(o, at, **flags):
    command = [o.load, "--port", at[0], "--pid", at[1], "--cpu", CPU, "--json", "-"]
    for name, value in flags.items():
        name = "--" + name.replace("_", "-")
        command += [name] if value is True else [name, value]
    out = json.loads(subprocess.run([*map(str, command)], check=True, text=True,
                                    stdout=subprocess.PIPE).stdout)
    allowed = {"200", "503"} if "flood" in flags else {"200"}
    if out.get("failed") or not set(out.get("statuses", {})) <= allowed:
        sys.exit(f"error: {' '.join(map(str, command))}: {out['statuses']}, {out['failed']} failed")
    return out


def generate(o, model, prompts, rows, max_tokens):
    """./chat generate's tokens a second, and the seconds of its prompts."""
    text = subprocess.run([o.chat, "generate", model, "--prompts", prompts, "--rows", str(rows),
                           "--max-tokens", str(max_tokens), "--temperature", "0", "--stats", "-o",
                           WORK / "texts.jsonl"], check=True, text=True, capture_output=True).stderr
    found = dict((name, (int(n), float(speed))) for name, n, speed in
                 re.findall(r"^(prompt|decode) +(\d+) tokens, ([\d.]+) tokens/s", text, re.M))
    prompt = found["prompt"][0] / found["prompt"][1]
    decode = found["decode"][0] / max(found["decode"][1], 1e-9)
    return found["decode"][0] / (prompt + decode), prompt


def write_prompts(o, name, count, words):
    """Different texts of so many words each, from Shakespeare's."""
    text = (o.texts / "text/tinyshakespeare.txt").read_text().split()
    path = WORK / f"{name}.txt"
    path.write_text("".join(" ".join(text[i * words:][:words]) + "\n" for i in range(count)))
    return path


def make_gpt2(o):
    run = WORK / "gpt2"
    if not (run / "model").is_dir():
        text = WORK / "text.txt"
        text.write_text((o.texts / "text/tinyshakespeare.txt").read_text()[:100_000])
        for command in (
                ["./bpe", "convert", o.texts / "tokenizers/r50k_base.tiktoken", WORK / "tokenizer"],
                ["./bpe", "encode", WORK / "tokenizer", text, "-o", WORK / "tokens/text"],
                ["./train_gpt", "--family", "gpt2", "--layers", 12, "--channels", 768, "--heads",
                 12, "--context", 1024, "--data", WORK / "tokens/text", "--steps", 1,
                 "--batch-tokens", 1024, "-o", run]):
            subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    return run


def ms(values, key="median"):
    return f"{values[key]:.1f} ms"


# -- the table's parts

def speed(o):
    # Long enough that most of the time all rows are full, in both programs.
    for name, model, goal, tokens in (("124M", o.gpt2, .95, 64), ("demo", o.demo, .8, 400)):
        for streams in (8, 64):
            requests = streams * (2 if name == "124M" else 1024 // streams if streams < 64 else 8)
            prompts = write_prompts(o, "prompts", requests, 12)
            ours, http, client, cores = [], [], [], []
            with cake(o, model, streams) as at:
                load(o, at, streams=streams, requests=streams, max_tokens=8, prompts=prompts)
                for _ in range(o.rounds):
                    ours.append(generate(o, model, prompts, streams, tokens)[0])
                    x = load(o, at, streams=streams, requests=requests, max_tokens=tokens,
                             prompts=prompts)
                    http.append(x["tokens_per_second"])
                    client.append(x["client_cores"])
                    cores.append(x["server_cores"])
            a, b = statistics.median(ours), statistics.median(http)
            report(f"{name}, {streams} rows: HTTP by ./chat generate, tokens/s",
                   f"{b:.0f} / {a:.0f} = {b / a:.3f}", f">= {goal}", b / a >= goal)
            x = statistics.median(client)
            report(f"{name}, {streams} rows: the client's share of a core", f"{x:.3f}", "<= 0.1",
                   x <= .1)


def first_token(o):
    for name, model in (("124M", o.gpt2), ("demo", o.demo)):
        count = 16
        prompts = write_prompts(o, "long", count, 200)
        prefill = statistics.median(generate(o, model, prompts, 1, 1)[1]
                                    for _ in range(o.rounds)) / count
        with cake(o, model, 8) as at:
            # First the cache is filled once: new memory of it costs page faults, a tenth of a prompt.
            load(o, at, streams=1, requests=40, max_tokens=2, prompt_tokens=250)
            # A text of one token, not streamed: the first token of a stream may complete no
            # character. Each prompt comes once, since the server would not read it again.
            x = load(o, at, streams=1, requests=count, max_tokens=1, prompts=prompts, whole=True)
        first = x["answer_ms"]["median"]
        report(f"{name}: first token of one stream, behind 200 words",
               f"{first:.1f} ms, prefill {1000 * prefill:.1f}", "<= prefill + 5 ms",
               first <= 1000 * prefill + 5)


def fairness(o):
    for name, model in (("124M", o.gpt2), ("demo", o.demo)):
        with cake(o, model, 16) as at:
            load(o, at, streams=8, requests=8, max_tokens=8)
            x = load(o, at, streams=8, requests=8, max_tokens=300, long_prompts=6, health=True)
        gap = x["gap_beside_long_prompts_ms"]
        report(f"{name}: largest gap while prompts of 960 tokens arrive",
               f"{ms(gap, 'max')} / {ms(gap)} = {x['largest_gap_by_median']:.1f}",
               "<= 3 x the median", x["largest_gap_by_median"] <= 3)
        report(f"{name}: by the median without them",
               f"{ms(gap, 'max')} / {ms(x['gap_ms'])} = {x['largest_gap_by_median_alone']:.1f}")
        report(f"{name}: these prompts take", ms(x["long_prompts_ms"]))
        health(f"{name}: /health meanwhile", x)


def health(what, x):
    h = x["health_ms"]
    report(what, f"p99 {ms(h, 'p99')}, max {ms(h, 'max')}", "p99 <= 50 ms",
           h["p99"] <= 50 and x["health_failed"] == 0)


def flood(o):
    for name, model in (("124M", o.gpt2), ("demo", o.demo)):
        for gap, how in ((0, "at once"), (1, "1 ms apart")):
            with cake(o, model, 8, "--queue", 32) as at:
                x = load(o, at, streams=8, requests=16, max_tokens=64, flood=256, flood_ms=gap,
                         health=True)
            f = x["flood"]
            known = set(f["statuses"]) <= {"200", "503"} and f["failed"] == 0
            report(f"{name}: 256 clients {how}, 8 rows, a queue of 32",
                   ", ".join(f"{n} x {s}" for s, n in f["statuses"].items()), "200 or 503, all",
                   known)
            if f["refused_ms"]:
                r = f["refused_ms"]
                report(f"{name}: a refusal takes",
                       f"{ms(r)}, p99 {ms(r, 'p99')}, max {ms(r, 'max')}",
                       "p99 <= 10 ms" if gap else "", r["p99"] <= 10 if gap else None)
            health(f"{name}: /health meanwhile", x)


def flat(o):
    with cake(o, o.demo, 64) as at:
        # First the cache takes the memory that finished sequences are kept in.
        load(o, at, streams=64, requests=30_000, max_tokens=4, prompt_tokens=16)
        x = load(o, at, streams=64, requests=10_000, max_tokens=4, prompt_tokens=16, health=True)
    first, last = x["process"][0], x["process"][-1]
    report("demo: 10,000 requests", f"{x['requests'] / x['seconds']:.0f} requests/s, "
           f"{x['statuses']['200']} x 200")
    report("demo: memory at request 1,000 and 10,000",
           f"{first['rss_mb']:.1f} MB, {last['rss_mb']:.1f} MB", "<= 2 % more",
           last["rss_mb"] <= 1.02 * first["rss_mb"])
    for key in ("descriptors", "threads"):
        report(f"demo: {key} at request 1,000 and 10,000", f"{first[key]}, {last[key]}",
               "no more", last[key] <= first[key])
    health("demo: /health meanwhile", x)


def drip(o):
    with cake(o, o.demo, 8) as at:
        x = load(o, at, drip=500)
    a, b, d = x["alone_ms"], x["beside_drip_ms"], x["delay_ms"]
    report("demo: a request beside 500 connections of a byte a second",
           f"{b['median']:.1f}, p99 {b['p99']:.1f}, max {ms(b, 'max')}; alone max {ms(a, 'max')}",
           "<= 50 ms more",
           d["median"] <= 50 and d["max"] <= 50 and b["failed"] == 0)


def peer(o):
    """llama.cpp's server: Q4_1 as it is, and the same weights in types that both multiply with."""
    files = {"Q4_1": o.smollm2}
    for kind in ("q8_0", "f16"):
        files[kind] = WORK / f"smollm2-{kind}.gguf"
        if not files[kind].is_file():
            subprocess.run([o.chat, "export", o.smollm2, "-o", files[kind], "--type", kind],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    more = json.dumps({"ignore_eos": True, "cache_prompt": False})
    for kind, file in files.items():
        found = {}
        for name, at in (("serve", cake(o, file, 8, "--context", 1024)),
                         ("llama.cpp", llama(o, file, 8, 1024))):
            with at as at:
                load(o, at, streams=8, requests=8, max_tokens=8, prompt_tokens=16)
                common = dict(prompt_tokens=64, more=more)
                found[name] = [load(o, at, streams=s, requests=4 * s, max_tokens=64, **common)
                               for s in (1, 8)]
                found[name].append(load(o, at, streams=4, requests=4, max_tokens=200,
                                        long_prompts=3, health=True, **common))
        a, b = found["serve"], found["llama.cpp"]
        for i, streams in enumerate((1, 8)):
            x, y = a[i], b[i]
            report(f"SmolLM2 {kind}, {streams} streams: serve by llama.cpp, tokens/s",
                   f"{x['tokens_per_second']:.1f} / {y['tokens_per_second']:.1f} = "
                   f"{x['tokens_per_second'] / y['tokens_per_second']:.2f}")
            report(f"SmolLM2 {kind}, {streams} streams: first token",
                   f"{ms(x['first_token_ms'])} / {ms(y['first_token_ms'])}")
        x, y = a[2], b[2]
        report(f"SmolLM2 {kind}: largest gap beside prompts of 960 tokens",
               f"{ms(x['gap_beside_long_prompts_ms'], 'max')} / "
               f"{ms(y['gap_beside_long_prompts_ms'], 'max')}")
        report(f"SmolLM2 {kind}: these prompts take",
               f"{ms(x['long_prompts_ms'])} / {ms(y['long_prompts_ms'])}")
        report(f"SmolLM2 {kind}: /health meanwhile, p99",
               f"{ms(x['health_ms'], 'p99')} / {ms(y['health_ms'], 'p99')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--demo", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    parser.add_argument("--gpt2", type=pathlib.Path)
    parser.add_argument("--smollm2", type=pathlib.Path)
    parser.add_argument("--peer")
    parser.add_argument("--texts", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--serve", default="./serve")
    parser.add_argument("--chat", default="./chat")
    parser.add_argument("--load", default="build/serve_load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="speed first_token fairness flood flat drip peer")
    parser.add_argument("--json", type=pathlib.Path, default=WORK / "table.json")
    o = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if (o.demo / "base").is_dir():
        o.demo = o.demo / "base"
    o.gpt2 = o.gpt2 or make_gpt2(o)
    for part in (speed, first_token, fairness, flood, flat, drip, peer):
        if part.__name__ not in o.only.split():
            continue
        if part is peer and not (o.peer and o.smollm2):
            print("no --peer and --smollm2: llama.cpp's server is left out")
            continue
        part(o)
    o.json.write_text(json.dumps(rows, indent=1) + "\n")
    return any(row["good"] is False for row in rows)


if __name__ == "__main__":
    sys.exit(main())
