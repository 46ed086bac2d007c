#!/usr/bin/env python3
"""Writes test/golden/llama3_template.json: conversations as transformers renders them for Llama 3.

The template is Llama 3's in its own words: headers, trimmed contents, <|eot_id|>, <|begin_of_text|>
before the first. A small vocabulary is trained by `./bpe train` with Llama 3's split pattern, and
its special tokens take Llama 3's names. Kept are the tokenizer, the conversations and the ids of
apply_chat_template with a generation prompt. Needs transformers (5.23 wrote the file), and ./bpe.

    python dev/golden/llama3_template.py
"""

import json
import pathlib
import subprocess
import tempfile

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).parents[2]

TEMPLATE = (
    "{%- for m in messages %}"
    "{%- if loop.first %}{{- bos_token }}{%- endif %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}")

NAMES = {"<|endoftext|>": "<|begin_of_text|>", "<|im_start|>": "<|start_header_id|>",
         "<|im_end|>": "<|end_header_id|>", "<tool_call>": "<|eot_id|>"}


def conversation(user, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": "user", "content": user}]


CONVERSATIONS = [
    conversation("Hi."),
    conversation("Who are you?", "You are Ada.\nBe brief."),
    conversation("  What's 12345 + 6789?\t"),
    conversation("\n\n  code:\n\n    x = 1\n\n", " Trim me. \n"),
    conversation("\u00a0\u65e5\u672c\u8a9e e\u0301 \U0001f600\u3000"),
]


def renamed(text):
    for ours, theirs in NAMES.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    return json.loads(text)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts = ["system\nuser\nassistant\n\n"] * 5 + [m["content"] for c in CONVERSATIONS for m in c] * 3
        (folder / "text.txt").write_text("\n".join(texts))
        subprocess.run(
            [ROOT / "bpe", "train", folder / "text.txt", "--vocab-size", "320", "--pattern", "cl100k", "-o", folder],
            check=True, stdout=subprocess.DEVNULL)
        for name in ["tokenizer.json", "tokenizer_config.json"]:
            data = renamed((folder / name).read_text())
            if name == "tokenizer_config.json":
                data.update(chat_template=TEMPLATE, eos_token="<|eot_id|>", pad_token="<|eot_id|>")
            (folder / name).write_text(json.dumps(data))
        for unused in folder.glob("chat_template*"):
            unused.unlink()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        out = {"tokenizer": json.loads((folder / "tokenizer.json").read_text()),
               "config": json.loads((folder / "tokenizer_config.json").read_text()),
               "conversations": []}
        for messages in CONVERSATIONS:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            out["conversations"].append({"messages": messages, "ids": prompt["input_ids"]})
            print(prompt["input_ids"], repr(tokenizer.decode(prompt["input_ids"])))
    path = ROOT / "test" / "golden" / "llama3_template.json"
    path.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
