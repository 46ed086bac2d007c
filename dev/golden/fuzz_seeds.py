"""Makes the seeds of the fuzz targets safetensors, config, tokenizer, verify and
chat_template in test/fuzz/seeds/: small valid inputs, from which `make fuzz` begins.

    python dev/golden/fuzz_seeds.py

What the parts of an input are: the first lines of test/fuzz/fuzz_TARGET.cpp. The seeds of parquet
are the files of test/golden/parquet and parquet_rows.
"""

import base64
import json
import os
import struct

ROOT = os.path.join(os.path.dirname(__file__), "../..")


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def write(target, name, data):
    folder = f"{ROOT}/test/fuzz/seeds/{target}"
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/{name}", "wb") as out:
        out.write(data)


# -------------------------------------------------------------------------------------------------
# safetensors: of the Config in test/fuzz/fuzz_safetensors.cpp

SHAPES = {
    "model.embed_tokens.weight": [5, 4],
    "model.layers.0.input_layernorm.weight": [4],
    "model.layers.0.self_attn.q_proj.weight": [4, 4],
    "model.layers.0.self_attn.k_proj.weight": [2, 4],
    "model.layers.0.self_attn.v_proj.weight": [2, 4],
    "model.layers.0.self_attn.o_proj.weight": [4, 4],
    "model.layers.0.post_attention_layernorm.weight": [4],
    "model.layers.0.mlp.gate_proj.weight": [6, 4],
    "model.layers.0.mlp.up_proj.weight": [6, 4],
    "model.layers.0.mlp.down_proj.weight": [4, 6],
    "model.norm.weight": [4],
    "lm_head.weight": [5, 4],
}
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1}


def safetensors(shapes, dtype, metadata=None):
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        begin = len(data)
        data += bytes(i % 60 for i in range(count * BYTES[dtype]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    text = compact(header)
    return struct.pack("<Q", len(text)) + text + data


def safetensors_seeds():
    for dtype in ["F32", "BF16"]:
        write("safetensors", f"model_{dtype}", b"\0" + safetensors(SHAPES, dtype, {"format": "pt"}))
    short = {name.removeprefix("model."): shape for name, shape in SHAPES.items()}
    write("safetensors", "without_prefix", b"\0" + safetensors(short, "BF16"))
    write(
        "safetensors", "other_types", b"\0" + safetensors({"a": [3], "b": [], "c": [0, 2]}, "I64")
    )
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: "a.safetensors" for name in SHAPES},
    }
    text = compact(index)
    write("safetensors", "index", b"\1" + text + b"\xff" + safetensors(SHAPES, "BF16"))
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    adapters = {q + "A.weight": [2, 4], q + "B.weight": [4, 2]}
    write("safetensors", "adapters", b"\2" + safetensors(adapters, "F32"))


# -------------------------------------------------------------------------------------------------
# config: those of the small models in test/golden


def config_seeds():
    def text(path):
        full = f"{ROOT}/test/golden/{path}"
        return compact(json.load(open(full))) if os.path.exists(full) else b""

    adapters = json.loads(text("peft_qwen3/adapter_config.json"))
    adapters = compact({**adapters, "base_model_name_or_path": "base"})
    for name in ["hf_gpt2", "hf_llama", "hf_qwen3", "hf_qwen3_reward"]:
        parts = [text(f"{name}/config.json"), text(f"{name}/generation_config.json"), adapters]
        write("config", name, b"\xff".join(parts))
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
    }
    others = {
        "yarn": {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}},
        "mistral": {"model_type": "mistral", "sliding_window": 4, "eos_token_id": [2, 3]},
        "quantized": {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
    }
    for name, keys in others.items():
        generation = b'{"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": true}'
        write("config", name, compact({**sizes, **keys}) + b"\xff" + generation)


# -------------------------------------------------------------------------------------------------
# verify: problems and answers as people and models write them


def verify_seeds():
    number = "Natalia sold 48/2 = 24 clips.\n#### 72"
    cases = [
        ({"question": "How many?", "answer": number}, "So 48+24=72.\n\nThe answer is $72."),
        ({"problem": "p", "answer": "\\frac{3}{4}"}, "\\boxed{\\dfrac{3}{4}} or 75 %, 7.5e-1"),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "reward_model": {"ground_truth": "9,500"},
            },
            "**Answer:** 9{,}500 or 9.500,00 or \u22129'500 or 1\u202f000",
        ),
        (
            {"question": "q", "choices": ["red", "green", "blue"], "answer": 1},
            "I think it is (B) green. Note that A is wrong. Final answer: **B**",
        ),
        (
            {
                "question": "q",
                "choices": {"text": ["a", "b"], "label": ["1", "2"]},
                "answerKey": "2",
            },
            "The correct option is 2).",
        ),
        ({"question": "Q", "A": "x", "B": "y", "answer": "B"}, "b."),
        ({"nums": [3, 5, 7], "target": 26}, "<answer>(3 * 7) + 5 = 26</answer>\n- 3\u00d77+5"),
        ({"question": "yes?", "answer": True}, "Yes, it is."),
        ({"question": "q", "answers": {"text": ["Paris", "paris, France"]}}, " Paris\n"),
        ({"question": "q", "rubric": {"max_words": 5, "must": ["a"]}}, "a b c d e f"),
        ({"type": "number", "value": "-1,234.50"}, "It is -1234.5 dollars."),
        ({"type": "contains", "any": ["baker"], "none": ["sailor"]}, "The Baker's house."),
        ({"type": "exact", "text": "yes"}, " yes "),
        ({"type": "tool", "name": "search", "then": {"type": "refuses"}}, "I don't know, sorry."),
    ]
    for i, (problem, answer) in enumerate(cases):
        text = json.dumps(problem, ensure_ascii=False) + "\0" + answer + "\0<think>*</think>*"
        write("verify", f"{i:02}", text.encode())
    answers = ["1e3", "50 %", "x = -5", "1,2,3", "(((1+2)))", "A", "#### Step 1\n#### 15", "1/2"]
    for i, answer in enumerate(answers):
        write("verify", f"answer_{i}", (answer + "\0" + answer + " is " + answer).encode())


# -------------------------------------------------------------------------------------------------
# tokenizer: every part of tokenizer.json as the families have it, with a small vocabulary

# One of each combination of parts
FAMILIES = [
    "gpt2",
    "phi-4",
    "llama-3",
    "qwen-2",
    "smollm",
    "viking",
    "falcon",
    "minimax",
    "command-r",
    "claude-2",
]


def byte_characters():  # GPT-2's spelling of bytes
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def tokenizer_seeds():
    # The bytes of the text in test/fuzz/fuzz_tokenizer.cpp
    text = (
        "Hello world, it's 12345 <|endoftext|> done.\n\n  a\tb café 日本 😀 aaaabc".encode()
        + b"\xff\xfe"
    )
    spelled = byte_characters()
    tokens = [spelled[b] for b in sorted(set(text))]
    merges = ["h e", "l l", "he ll", "a a", "aa aa", "Ġ d", "1 2"]
    tokens += [m.replace(" ", "") for m in merges if not m.startswith("h")]
    tokens += ["he", "hell"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = {"type": "BPE", "vocab": vocab, "merges": [m for m in merges if m.split()[0] in vocab]}
    families = json.load(open(f"{ROOT}/test/golden/tokenizer_families.json"))["families"]
    for family in families:
        if family["name"] not in FAMILIES:
            continue
        ids, added = {}, []
        for text, flags in family["added"][:6]:
            ids[text] = len(vocab) + len(ids)
            token = {"id": ids[text], "content": text}
            for flag in ["single_word", "lstrip", "rstrip", "normalized", "special"]:
                token[flag] = flag in flags
            added.append(token)
        processor = family["post_processor"]
        for part in (processor or {}).get("processors", [processor]):
            for name, special in (part or {}).get("special_tokens", {}).items():
                special["ids"] = [ids[name]]
        file = {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": family["normalizer"],
            "pre_tokenizer": family["pre_tokenizer"],
            "post_processor": processor,
            "decoder": {"type": "ByteLevel"},
            "model": {**model, "ignore_merges": family["ignore_merges"]},
        }
        config = {"eos_token": added[0]["content"], "chat_template": "{{ messages }}"}
        write("tokenizer", family["name"], b"\0" + compact(file) + b"\xff" + compact(config))
    steps = [
        {"type": "Prepend", "prepend": "_"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
        {"type": "Lowercase"},
    ]
    file = {"model": model, "normalizer": {"type": "Sequence", "normalizers": steps}}
    file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    write("tokenizer", "normalizers", b"\0" + compact(file))
    beside = [
        "\n".join(["#version: 0.2", *model["merges"]]).encode(),
        compact(vocab),
        compact({"eos_token": {"content": "<end>"}}),
        compact({"<end>": len(vocab), "<|endoftext|>": len(vocab) + 1}),
        compact({"additional_special_tokens": ["<end>"]}),
    ]
    write("tokenizer", "merges", b"\4" + b"\xff".join(beside))
    ranks = [*(bytes([b]) for b in range(256)), b"he", b"hell"]
    lines = (base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(ranks[200:]))
    write("tokenizer", "tiktoken", b"\7" + b"".join(lines))


# -------------------------------------------------------------------------------------------------
# chat_template: a template, a byte 0, and a conversation whose parts begin with bytes 1 to 8

HEADERS = """{{ bos_token }}{% for m in messages %}
{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '</s>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
TOOLS_LAST = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.last %}{{- '[TOOLS] ' + (tools | tojson) }}{%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}{{- call.function | tojson(indent=2) }}{%- if not loop.last %}, {% endif %}{%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
STRICT = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{{ '<|im_start|>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' ~ m.content | trim ~ '<|im_end|>\\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""
THINKS = """{% set ns = namespace(last=-1, first=true) %}{% for m in messages if m.role == 'user' %}
{% set ns.last = loop.index0 %}{% endfor %}{% macro part(text, begin='<think>', end='</think>') -%}
{{ begin ~ '\\n' ~ text ~ '\\n' ~ end }}{%- endmacro %}{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}{{ part(m.reasoning_content) if m.reasoning_content }}
{{- m.content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>{% endgeneration %}
{% elif m.role == 'tool' %}{% continue %}{% else %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}
{% if add_generation_prompt %}<think>
{% endif %}"""
PLAIN = """{% for m in messages %}{% set name = {'user': 'Human', 'assistant': 'Assistant'}[m.role] %}
### {{ name | upper }} ({{ strftime_now('%d %b %Y') }}): {{ m.content }}

{% endfor %}{% if add_generation_prompt %}### ASSISTANT:{% endif %}"""
TURNS = "\2Hi.\3Hello.\2More?\3<think>\nWhat?\n</think>\n\nYes."
CALLS = '\7{"name":"f","parameters":{}}\1Be brief.\2Go.\3\5I look.\6f {"a":[1,"x"]}\4{"b":2}\3Done.'


def chat_template_seeds():
    for name, text, conversation in [("headers", HEADERS, TURNS), ("tools_last", TOOLS_LAST, CALLS),
                                     ("strict", STRICT, TURNS), ("thinks", THINKS, CALLS), ("plain", PLAIN, TURNS)]:  # fmt: skip
        write("chat_template", name, (text + "\0" + conversation).encode())


if __name__ == "__main__":
    safetensors_seeds()
    config_seeds()
    tokenizer_seeds()
    verify_seeds()
    chat_template_seeds()
