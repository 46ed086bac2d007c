#!/usr/bin/env python3
"""Writes test/golden/chat_template.json: conversations rendered by transformers with our Jinja.

For each split pattern a small vocabulary is trained by `./bpe train` on the conversations' texts;
its tokenizer_config.json holds the template. Kept are the tokenizer, each conversation, the ids
that apply_chat_template gives with the mask of its {% generation %} parts, and the ids with a
generation prompt. Needs transformers (5.24 wrote the file), and ./bpe.

    python dev/golden/chat_template.py
"""

import json
import pathlib
import random
import subprocess
import tempfile

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).parents[2]


def message(role, content, *calls):
    out = {"role": role, "content": content}
    if calls:
        out["tool_calls"] = [{"type": "function", "function": c} for c in calls]
    return out


def thought(content, reasoning):
    return {**message("assistant", content), "reasoning_content": reasoning}


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    about = f"Runs \"{name}\" \u2014 fast & exact."
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


CALCULATOR = tool("calculator", expression={"type": "string"})
SEARCH = tool("search", query={"type": "string"}, most={"type": "number", "maximum": 9.5, "minimum": -1e-5})

CONVERSATIONS = [
    {"messages": [message("user", "Hi."), message("assistant", "Hello! What can I do?")]},
    {"messages": [message("system", "You are Ada.\nBe brief."), message("user", "Who are you?"), message("assistant", "Ada.")]},
    {"messages": [message("user", "2+2?"), message("assistant", "4"), message("user", "And 3+3?"), message("assistant", "6"),
                  message("user", "Thanks"), message("assistant", "You're welcome.")]},
    # White space at the ends of contents, where patterns join it to line ends.
    {"messages": [message("system", " \n "), message("user", "\n\n  code:\n\tx = 1\n\n"), message("assistant", "\n \n Here:\n\n    y = 2\n \n"),
                  message("user", "  "), message("assistant", "\u00a0\u3000\x1c\u0085ok\u2028\x1f")]},
    {"messages": [message("user", "\n"), message("assistant", "\r\n'S is it\r\n\r\n")]},
    {"messages": [message("user", "e\u0301 \u65e5\u672c\u8a9e \U0001f600"), message("assistant", "\u0301 combining first, \u041f\u0440\u0438\u0432\u0435\u0442 \u00bd")]},
    {"messages": [message("user", "What is 12*12?"), message("assistant", "", call("calculator", expression="12*12")),
                  message("tool", "144"), message("assistant", "It is 144.")], "tools": [CALCULATOR]},
    {"messages": [message("system", "Use tools."), message("user", "Both?"),
                  message("assistant", "I look.", call("search", query="na\u00efve \"quotes\" \\ \n\t\u2028", most=3), call("calculator", expression="(1+2)/3")),
                  message("tool", "One\npassage."), message("tool", "1"), message("assistant", "Done."),
                  message("user", "Again"), message("assistant", "  ", call("search", query="x", most=1.0), call("search", query="y", most=1e21)),
                  message("tool", ""), message("assistant", "Nothing.")], "tools": [SEARCH, CALCULATOR]},
    {"messages": [message("user", "Call."), message("assistant", None, call("search", query="q", nested={"a": [1, -2.5, True, None, {}], "b": []}))],
     "tools": [SEARCH]},
    {"messages": [message("user", "As text."), {"role": "assistant", "content": "", "tool_calls": [{"name": "search", "arguments": "{\"query\":\"q\"}"}]}],
     "tools": [SEARCH["function"]]},
    {"messages": [message("user", "<tools> and <think and im_start|>"), message("assistant", "</ tool_call> <|im_end")]},
    # Reasoning: a field or the beginning of the content, in the last answer and in earlier ones.
    {"messages": [message("user", "2+2?"), thought("4", "\n2 and 2. \n")]},
    {"messages": [message("user", "a"), thought("b", "cut"), message("user", "c"), message("assistant", "<think>\nkept\n</think>\n\nd")]},
    {"messages": [message("user", "a"), message("assistant", "<think>cut</think> \n b"), message("user", "c"),
                  message("assistant", "<think>\n\n</think>\n\nd </think> <think>e")]},
    {"messages": [message("user", "Call."), {**message("assistant", "", call("search", query="x", most=1)), "reasoning_content": "I look."},
                  message("tool", "Nothing."), thought("None.", "Nothing there."), message("user", "Sure?"), thought("Yes.", " ")], "tools": [SEARCH]},
    {"messages": [message("user", "Write it."), message("assistant", "So: <tool_call>\n{'name': 'f'}\n</tool_call> and <think> open")]},
    # Calls without arguments; a system message in the middle; the assistant begins.
    {"messages": [message("user", "Now?"), message("assistant", "", {"name": "search", "arguments": ""}, {"name": "search", "arguments": None}),
                  message("tool", "1"), message("tool", "2"), message("assistant", "Now.")], "tools": [SEARCH]},
    {"messages": [message("system", "A"), message("assistant", "Welcome."), message("user", "b"), message("system", "C"), message("assistant", "d")]},
]


def random_conversations():
    """Short contents of all classes of characters: borders are what matters."""
    draw = random.Random(7)
    alphabet = list("aB  \n\n\r\t'sS!/.?09") + list("\u0301\u65e5\u00df\u00a0\u3000\u2028\x85\x1c\u00bd\u00e9\U0001f600")
    text = lambda: "".join(draw.choices(alphabet, k=draw.randint(1, 9)))
    for _ in range(20):
        messages = [message("system", text())] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            messages += [message("user", text()), message("assistant", text() + "x" + text())]
        yield {"messages": messages}


def main():
    conversations = CONVERSATIONS + list(random_conversations())
    out = {"conversations": conversations, "tokenizers": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts = [m["content"] or "" for c in conversations for m in c["messages"]]
        texts += ["system\nuser\nassistant\n", json.dumps([CALCULATOR, SEARCH])] * 5
        (folder / "text.txt").write_bytes("\n".join(texts).encode())
        for pattern in ["gpt2", "cl100k", "qwen2"]:
            subprocess.run(
                [ROOT / "bpe", "train", folder / "text.txt", "--vocab-size", "369", "--pattern", pattern, "-o", folder / pattern],
                check=True, stdout=subprocess.DEVNULL)
            tokenizer = AutoTokenizer.from_pretrained(folder / pattern)
            rendered = []
            for c in conversations:
                # An assistant's None is what JSON has as null.
                full = tokenizer.apply_chat_template(
                    c["messages"], tools=c.get("tools"), return_dict=True, return_assistant_tokens_mask=True)
                prompt = tokenizer.apply_chat_template(
                    c["messages"][:-1], tools=c.get("tools"), add_generation_prompt=True, return_dict=True)
                rendered.append({"ids": full["input_ids"], "trained": "".join(map(str, full["assistant_masks"])), "prompt": prompt["input_ids"]})
            out["tokenizers"].append({
                "pattern": pattern,
                "tokenizer": json.loads((folder / pattern / "tokenizer.json").read_text()),
                "config": json.loads((folder / pattern / "tokenizer_config.json").read_text()),
                "rendered": rendered})
    path = ROOT / "test" / "golden" / "chat_template.json"
    path.write_bytes((json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n").encode())


if __name__ == "__main__":
    main()
