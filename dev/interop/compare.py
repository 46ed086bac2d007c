#!/usr/bin/env python3
"""Models of ours beside llama.cpp: token ids, log-probabilities, greedy text, chat.

    dev/interop/compare.py --train DIR --text TEXT       trains a small model of each shape, then
    dev/interop/compare.py MODEL ... --out DIR --text TEXT

Each MODEL, a directory or a .gguf file, is exported with --type f32, and both programs read that
file in f32 with a cache in f32. Expected:

- ids: the same for every text, with and without special tokens;
- log-probabilities of every token of 20 texts like those the model learned: within 2e-4, gpt2 within
  5e-3, since llama.cpp reads GELU from a table of f16 numbers (that this is the reason is checked:
  NumPy with such a table is within 2e-3 of llama.cpp: an input near the middle of two f16 numbers is
  rounded up in one and down in the other);
- greedy text behind 20 prompts: the same up to the first place where our two best logits lie closer
  than three times that bound, and that place is past 100 tokens for at least 15 prompts;
- assistants: a conversation through the file's own chat template, rendered by llama.cpp, to which
  both give the same answer, and the model ends it itself.

The results go to standard output, and into DIR/compare.json. Needs numpy, gguf and xllamacpp.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np

import llama
from safetensors_file import read_safetensors, write_safetensors

HERE = pathlib.Path(__file__).parent
PROMPTS, TOKENS, NEEDED = 20, 120, 15

# Texts that tokenizers cut apart in different ways.
HARD_TEXTS = [
    "", " ", "  two  spaces ", "\n\n\nlines\r\n\r\n end\n", "\t\ttabs\tand  spaces\t",
    "I'm, you'RE, we'll; it's THEY'VE 'tis", "1 12 123 1234 12345 3.14159 1,000,000 0x1F",
    "snake_case camelCase kebab-case UPPER lower", "e = mc² ½ ² Ⅳ ४२ ٣٤", "naïve café e\u0301 coöperate",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย", "日本語の文章。中文，한국어!", "👩‍👩‍👧‍👦 🏳️‍🌈 ✈️ 🤷🏽‍♀️",
    "<|endoftext|> <|im_start|>user\nhello<|im_end|>\n", "<tool_call>{\"a\": [1, 2]}</tool_call>",
    "!!!??? ... -- ((nested [brackets])) {x: 'y'}", "https://example.org/a?b=c&d=%20#e",
    "\u00a0no\u2003break\u200bspaces\ufeff", "ſtraße ſ's İstanbul ıŞ", "a" * 300, "0" * 50,
]


def run(*words, **more):
    words = [str(w) for w in words]
    print("$", *words, flush=True)
    return subprocess.run(words, check=True, **more)


def ours(o, model, requests):
    text = "".join(json.dumps(r) + "\n" for r in requests)
    out = subprocess.run([o.logits, str(model), "--threads", "1"], input=text, text=True, check=True,
                         stdout=subprocess.PIPE).stdout
    return [json.loads(line) for line in out.splitlines()]


# -------------------------------------------------------------------------------------------------
# A model beside llama.cpp


def compare(o, model, prompts, is_base, out):
    """Returns the figures of one model, and a list of what is not as expected."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model-f32.gguf"
    path.unlink(missing_ok=True)
    run(o.chat, "export", model, "-o", path, "--type", "f32")
    source = pathlib.Path(model)
    source = source / "model" if (source / "model").is_dir() else source
    check = [sys.executable, HERE / "gguf_check.py", path]
    if (source / "config.json").exists() and not (source / "adapter_config.json").exists():
        check.append(source)
    run(*check)
    problems, figures = [], {}
    context = 1024
    with llama.Llama(path, context=context, threads=1) as theirs:
        arch = architecture(path)
        bound = 5e-3 if arch == "gpt2" else 2e-4
        figures |= {"architecture": arch, "bound": bound}
        texts = passages(o.text)
        check_ids(o, path, theirs, texts, figures, problems)
        check_logp(o, path, theirs, passages(prompts), bound, figures, problems)
        if arch == "gpt2":
            check_gelu_table(path, theirs, texts, figures, problems)
        check_greedy(o, path, theirs, passages(prompts), 3 * bound, figures, problems)
        # A base model's file may have a template too, from its tokenizer, but it has never seen a chat.
    if template(path) and not is_base:
        check_chat(o, path, figures, problems)
    return figures, problems


def architecture(path):
    from gguf import GGUFReader
    return GGUFReader(path).fields["general.architecture"].contents()


def template(path):
    from gguf import GGUFReader
    field = GGUFReader(path).fields.get("tokenizer.chat_template")
    return field and field.contents()


def passages(path):
    """Pieces of the text that begin with a word, spread evenly."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    out = []
    for i in range(200):
        begin = text.find(" ", i * len(text) // 200) + 1
        out.append(text[begin:begin + 400])
    return out


SHOWN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def check_ids(o, path, theirs, texts, figures, problems):
    texts = HARD_TEXTS + texts
    requests = [{"text": t, "special": special} for t in texts for special in (False, True)]
    # Tokens that clients show are user-defined in the file, and those llama.cpp finds in every text.
    shown = [t for t in SHOWN if len(theirs.tokenize(t, False)) == 1]
    requests = [r for r in requests if r["special"] or not any(t in r["text"] for t in shown)]
    different = []
    for r, a in zip(requests, ours(o, path, requests)):
        found = theirs.tokenize(r["text"], r["special"])
        if found != a["ids"]:
            different.append(r["text"])
            problems.append(f"ids of {r['text'][:60]!r} (special {r['special']}): "
                            f"ours {a['ids'][:12]}, llama.cpp {found[:12]}")
    figures["texts"], figures["texts with other ids"] = len(requests), len(different)


def check_logp(o, path, theirs, texts, bound, figures, problems):
    ids = [theirs.tokenize(t)[:120] for t in texts[:PROMPTS]]
    worst = 0.0
    for a in ours(o, path, [{"ids": i, "logp": True} for i in ids]):
        error = np.abs(theirs.logp(a["ids"]) - np.array(a["logp"])).max()
        worst = max(worst, error if np.isfinite(error) else np.inf)
    figures["log-probabilities"] = sum(len(i) - 1 for i in ids)
    figures["largest difference"] = worst
    if not worst <= bound:
        problems.append(f"log-probabilities differ by {worst:.2e}, expected {bound:.0e}")


def check_gelu_table(path, theirs, texts, figures, problems):
    """gpt2: that the table of GELU is all that llama.cpp does in another way."""
    from gguf import GGUFReader
    reader = GGUFReader(path)
    t = {x.name: np.array(x.data, np.float64) for x in reader.tensors}
    layers = reader.fields["gpt2.block_count"].contents()
    heads = reader.fields["gpt2.attention.head_count"].contents()
    eps = reader.fields["gpt2.attention.layer_norm_epsilon"].contents()

    def gelu(x):
        return .5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + .044715 * x**3)))

    def table(x):  # f16 in, f16 out, between -10 and 10
        y = gelu(x.astype(np.float16).astype(np.float64)).astype(np.float16).astype(np.float64)
        return np.where(x <= -10, 0, np.where(x >= 10, x, y))

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * t[name + ".weight"] + t[name + ".bias"]

    def linear(x, name):
        return x @ t[name + ".weight"].T + t[name + ".bias"]

    def logp(ids, activation):
        n = len(ids) - 1
        x = t["token_embd.weight"][ids[:-1]] + t["position_embd.weight"][:n]
        mask = np.triu(np.full((n, n), -np.inf), 1)
        for i in range(layers):
            b = f"blk.{i}."
            q, k, v = (y.reshape(n, heads, -1).swapaxes(0, 1) for y in
                       np.split(linear(norm(x, b + "attn_norm"), b + "attn_qkv"), 3, axis=1))
            a = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + mask
            a = np.exp(a - a.max(-1, keepdims=True))
            a = (a / a.sum(-1, keepdims=True)) @ v
            x = x + linear(a.swapaxes(0, 1).reshape(n, -1), b + "attn_output")
            x = x + linear(activation(linear(norm(x, b + "ffn_norm"), b + "ffn_up")), b + "ffn_down")
        x = norm(x, "output_norm") @ t.get("output.weight", t["token_embd.weight"]).T
        x -= x.max(1, keepdims=True)
        return (x - np.log(np.exp(x).sum(1, keepdims=True)))[np.arange(n), ids[1:]]

    worst = {"NumPy with GELU": 0.0, "NumPy with GELU's table": 0.0}
    for text in texts[:PROMPTS]:
        ids = theirs.tokenize(text)[:120]
        found = theirs.logp(ids)
        for name, activation in zip(worst, (gelu, table)):
            worst[name] = max(worst[name], np.abs(found - logp(ids, activation)).max())
    figures["llama.cpp differs from"] = worst
    if not worst["NumPy with GELU's table"] <= 2e-3:
        problems.append(f"llama.cpp differs from NumPy with GELU's table by {worst}")


def check_greedy(o, path, theirs, texts, closest, figures, problems):
    """`closest`: where our two best logits lie closer than this, another choice is no fault."""
    prompts = [theirs.tokenize(t)[:40] for t in texts[:PROMPTS]]
    answers = ours(o, path, [{"ids": p, "greedy": TOKENS} for p in prompts])
    long_enough, same = 0, []
    for prompt, a in zip(prompts, answers):
        found, _ = theirs.greedy(prompt, TOKENS)
        tight = next((i for i, m in enumerate(a["margins"]) if m < closest), len(a["margins"]))
        equal = next((i for i, (x, y) in enumerate(zip(a["greedy"], found)) if x != y),
                     min(len(a["greedy"]), len(found)))
        ended = tight == len(a["margins"]) < TOKENS  # the model itself ended the text
        long_enough += tight > 100 or ended
        same.append(equal)
        if equal < tight:
            problems.append(f"greedy text differs at token {equal}, where our margin is "
                            f"{a['margins'][equal]:.4f}, expected the same before {tight}")
    figures["prompts with clear margins past 100 tokens"] = long_enough
    figures["tokens in common"] = same
    if long_enough < NEEDED:
        problems.append(f"only {long_enough} of {len(prompts)} prompts have clear margins past "
                        f"100 tokens, expected {NEEDED}")


QUESTIONS = ["What is 27 plus 45?", "Who are you?", "What is the capital of France?",
             "Tell me a story about a dog."]


def check_chat(o, path, figures, problems):
    """In another process: llama.cpp's server has no end."""
    code = "import json, sys, llama; print(json.dumps(llama.chat(sys.argv[1], json.loads(sys.argv[2]), 200, threads=1)))"
    messages = [[{"role": "user", "content": q}] for q in QUESTIONS]
    answer = subprocess.run([sys.executable, "-c", code, str(path), json.dumps(messages)],
                            env=os.environ | {"PYTHONPATH": str(HERE)}, text=True, check=True,
                            stdout=subprocess.PIPE).stdout
    theirs = json.loads(answer.splitlines()[-1])
    requests = [{"text": t["prompt"], "special": True, "greedy": 200} for t in theirs]
    ended, same = 0, 0
    for t, a in zip(theirs, ours(o, path, requests)):
        text = re.sub(r"<\|(im_end|endoftext|eot_id|end_of_text)\|>$", "", a["greedy_text"])
        ended += t["finish_reason"] == "stop"
        same += text.strip() == t["content"].strip()
        print(f"  {t['messages'][-1]['content']}  ->  {t['content']!r} ({t['finish_reason']})")
        if text.strip() != t["content"].strip():
            problems.append(f"chat: ours {text!r}, llama.cpp {t['content']!r}, "
                            f"smallest margin {min(a['margins']):.4f}")
    figures["chat answers that end"], figures["chat answers in common"] = ended, same
    if ended == 0:
        problems.append("chat: no answer ended")


# -------------------------------------------------------------------------------------------------
# Small models of each shape. They learn a page by heart, in half a minute each: a model that knows
# little has close margins everywhere, and its greedy text could not be compared for long.

SHAPES = {  # name -> family, split pattern, flags
    "gpt2": ("gpt2", "gpt2", []),
    "llama": ("llama", "cl100k", ["--heads", 4, "--kv-heads", 2, "--head-size", 48]),
    "qwen3": ("qwen3", "qwen2", ["--heads", 4, "--kv-heads", 2]),
    "before-qwen2": ("llama", "qwen2", ["--heads", 4, "--kv-heads", 2, "--head-size", 32]),
}


def train(o, out):
    """Returns the models' directories."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "page.txt").write_bytes(o.text.read_bytes()[:8000])
    models = []
    for name, (family, pattern, flags) in SHAPES.items():
        tokenizer, tokens, run_dir = out / f"tokenizer-{pattern}", out / f"tokens-{pattern}", out / name
        if name != "before-qwen2":
            models.append(run_dir / "model")
        if (run_dir / "summary.json").exists():
            continue
        run(o.bpe, "train", o.text, "--vocab-size", 768, "--pattern", pattern, "-o", tokenizer)
        run(o.bpe, "encode", tokenizer, out / "page.txt", "-o", tokens / "page")
        run(o.train_gpt, "--data", tokens / "page", "-o", run_dir, "--overwrite", "--family", family,
            "--layers", 2, "--channels", 128, "--context", 256, "--steps", o.steps,
            "--batch-tokens", 1024, "--optimizer", "adamw", "--lr", 3e-3, "--embedding-lr", 3e-3,
            "--head-lr", 3e-3, "--vector-lr", 3e-3, "--weight-decay", .1, "--sample-every", o.steps,
            *flags)
    models.append(qwen2_of(out / "before-qwen2" / "model", out / "qwen2"))
    return models


def qwen2_of(llama_dir, out):
    """A llama model with random biases of q, k and v is a qwen2 model."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = read_safetensors(llama_dir)
    config = json.loads((llama_dir / "config.json").read_text())
    random = np.random.default_rng(1)
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            n = tensors[name].shape[0]
            tensors[name.replace(".weight", ".bias")] = random.normal(0, .1, n).astype("f4")
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    config.pop("attention_bias", None), config.pop("mlp_bias", None)
    write_safetensors(out / "model.safetensors", tensors)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((llama_dir / name).read_bytes())
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*", type=pathlib.Path)
    parser.add_argument("--train", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=500, help="of training, with --train")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/compare"))
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--bin", default=".", help="where the stages' binaries are")
    parser.add_argument("--build", default="build", help="where build/logits is")
    o = parser.parse_args()
    o.chat, o.bpe, o.train_gpt = f"{o.bin}/chat", f"{o.bin}/bpe", f"{o.bin}/train_gpt"
    o.logits = f"{o.build}/logits"
    models = [(m, o.text, False) for m in o.models]
    if o.train:
        models += [(m, o.train / "page.txt", True) for m in train(o, o.train)]
    results, bad = {}, 0
    for model, prompts, is_base in models:
        figures, problems = compare(o, model, prompts, is_base, o.out / str(model).strip("/.").replace("/", "-"))
        results[str(model)] = figures
        print(f"{model}: {json.dumps(figures)}")
        for p in problems:
            print(f"  {model}: {p}")
        bad += len(problems)
    (o.out / "compare.json").write_text(json.dumps(results, indent=2) + "\n")
    print("all as expected" if bad == 0 else f"{bad} things are not as expected")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
