#!/usr/bin/env python3
"""Writes test/golden/reward_model/ and reward_scores.jsonl: a reward model that `./reward train`
made, and the scores that transformers gives with it, in one padded batch.

transformers reads a score at the last token that is not pad_token_id: at the end of turn of a chat,
at the <|endoftext|> behind a raw text. cake adds config.json's reward_shift to it. Needs
transformers (5.24 wrote the files), ./bpe, ./train_gpt and ./reward.

    python dev/golden/reward.py
"""

import json
import pathlib
import shutil
import subprocess
import tempfile

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / "test/golden/reward_model"


def chat(asked, answer):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def run(*words):
    subprocess.run([str(w) for w in words], cwd=ROOT, check=True)


def make_model(folder):
    text, pairs = folder / "text.txt", folder / "pairs.jsonl"
    text.write_text("the user asks, the assistant says yes or no, 1 2 3 4.\n" * 200)
    with open(pairs, "w") as file:
        for i in range(48):
            asked, good, bad = f"ask {i}", f"yes {i % 5}", f"no {i % 3} ok"
            file.write(json.dumps(dict(chosen=chat(asked, good), rejected=chat(asked, bad))) + "\n")
            file.write(json.dumps(dict(prompt=asked, chosen=" " + good, rejected=" " + bad)) + "\n")
    run("./bpe", "train", text, "--vocab-size", 290, "-o", folder / "tok")
    run("./bpe", "encode", folder / "tok", text, "--val-fraction", .1, "-o", folder / "d/x")
    run("./train_gpt", "--data", folder / "d/x", "--layers", 1, "--channels", 32, "--heads", 1, "--context", 96,
        "--batch-tokens", 256, "--steps", 5, "-o", folder / "base")
    run("./reward", "train", "--model", folder / "base", "--data", pairs, "--epochs", 3, "--batch", 8, "--lr", .003,
        "-o", folder / "run")
    shutil.rmtree(MODEL, ignore_errors=True)
    MODEL.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "run/model" / name, MODEL / name)


@torch.no_grad()
def scores(texts):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, dtype=torch.float64).eval()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    assert (batch.input_ids == model.config.pad_token_id).any()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    return [float(x) + model.config.reward_shift for x in logits]


def main():
    with tempfile.TemporaryDirectory() as folder:
        make_model(pathlib.Path(folder))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    records, texts = [], []
    for asked, answer in [("ask 1", "yes 2"), ("ask 1", "no 1 ok"), ("2 + 2?", "yes, and more of it, 1 2 3 4.")]:
        records.append(dict(messages=chat(asked, answer)))
        # the template's line end stands behind the end of turn, where the score is read
        texts.append(tokenizer.apply_chat_template(records[-1]["messages"], tokenize=False).removesuffix("\n"))
        records.append(dict(prompt=asked, completion=" " + answer))
        texts.append(f"<|endoftext|>{asked} {answer}<|endoftext|>")
    records.append(dict(text="the assistant says yes"))
    texts.append("<|endoftext|>the assistant says yes<|endoftext|>")
    with open(ROOT / "test/golden/reward_scores.jsonl", "w") as file:
        for record, score in zip(records, scores(texts)):
            file.write(json.dumps(record | dict(transformers=score)) + "\n")


if __name__ == "__main__":
    main()
