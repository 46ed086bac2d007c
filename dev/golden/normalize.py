#!/usr/bin/env python3
"""Writes test/golden/normalize.json: properties and normal forms of Unicode, Hugging Face's
normalizers and added tokens.

Properties and normal forms of all code points are hashes: unicodedata2 16.0.0 gives categories and
forms, `regex` gives White_Space and Han, `tokenizers` (Rust's own) lower case, each for the code
points that Unicode 16 assigns. Texts are normalized and encoded by `tokenizers` (0.23 wrote the
file), over a vocabulary of the 256 bytes, so that ids show every byte. Its normal forms follow an
older version of Unicode: the texts have characters of Unicode 3.2.

    python dev/golden/normalize.py
"""

import json
import pathlib
import random
import unicodedata

import regex
import unicodedata2 as ucd
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

CODES = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
ASSIGNED = [c for c in CODES if ucd.category(chr(c)) != "Cn"]
OLD = [chr(c) for c in ASSIGNED if unicodedata.ucd_3_2_0.category(chr(c)) != "Cn"]
MARKS = [c for c in OLD if ucd.combining(c)]
DECOMPOSED = [c for c in OLD if ucd.decomposition(c)]
HANGUL = [chr(c) for r in ((0x1100, 0x1113), (0x1161, 0x1176), (0x11A8, 0x11C3), (0xAC00, 0xAC80))
          for c in range(*r)]
SPACES = list(" \t\n\r\u00a0\u3000\u2003 ")
WORDS = ["a", "A", "b", "xy", "<a>", "<b>", "<|x|>", "\u00c9", "e\u0301", "\u0130", "the", "_", "-",
         "\u24b6", "\u200d", "  ", "   ", "fi", "\ufb01", "\u00c5", "\u03a3", "<|endoftext|>"]
DRAW = random.Random(7)


def hash64(data):
    """Of cake/run.h: FNV-1a, then mixed."""
    h = 0xCBF29CE484222325
    for c in data:
        h = (h ^ c) * 0x100000001B3 % 2**64
    h = (h + 0x9E3779B97F4A7C15) % 2**64
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    h = (h ^ h >> 27) * 0x94D049BB133111EB % 2**64
    return h ^ h >> 31


def unicode_hashes():
    lower, white, han = normalizers.Lowercase(), regex.compile(r"\p{White_Space}"), regex.compile(r"\p{Han}")
    flags = "".join(ucd.category(chr(c)) + ("w" if white.match(chr(c)) else "")
                    + ("h" if han.match(chr(c)) else "") for c in ASSIGNED)
    texts = {"properties": flags,
             "lower": "".join(lower.normalize_str(chr(c)) for c in ASSIGNED)}
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        texts[form] = "".join(ucd.normalize(form, chr(c)) for c in CODES)
    return {name: f"{hash64(text.encode()):016x}" for name, text in texts.items()}


def text(tokens=(), parts=12):
    out = []
    for _ in range(DRAW.randint(1, parts)):
        k = DRAW.random()
        out.append(DRAW.choice(tokens) if tokens and k < .3 else DRAW.choice(WORDS) if k < .5 else
                   DRAW.choice(SPACES) if k < .65 else chr(DRAW.randrange(32, 127)) if k < .75 else
                   DRAW.choice(DRAW.choice([OLD, MARKS, DECOMPOSED, HANGUL])))
    return "".join(out)


NORMALIZERS = [
    normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(),
    normalizers.Lowercase(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"),
    normalizers.Replace("aa", "a"), normalizers.Replace("e\u0301", ""),
    normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.NFC()]),
    normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(" ", "__")]),
    normalizers.Sequence([normalizers.Lowercase(), normalizers.NFKC(), normalizers.Replace("a", "\u00c9")]),
]


def tokenizer(normalizer, prefix, tokens):
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    for token in tokens:
        flag = lambda: DRAW.random() < .3
        added = AddedToken(token, single_word=flag(), lstrip=flag(), rstrip=flag(), normalized=flag())
        (t.add_special_tokens if DRAW.random() < .5 else t.add_tokens)([added])
    return t


def encoded(t, string, special):
    t.encode_special_tokens = not special
    try:
        return t.encode(string, add_special_tokens=False).ids
    except BaseException:  # it stops where a token's stripped space holds another token
        return None


def main():
    draws = [text() for _ in range(60)]
    golden = {"unicode": unicode_hashes(), "texts": draws, "normalizers": [], "tokenizers": []}
    for n in NORMALIZERS:
        t = tokenizer(n, False, [])
        golden["normalizers"].append({"normalizer": json.loads(t.to_str())["normalizer"],
                                      "texts": [n.normalize_str(x) for x in draws]})
    golden["vocab"] = json.loads(tokenizer(None, False, []).to_str())["model"]["vocab"]
    for i in range(24):
        tokens = sorted({DRAW.choice(WORDS) if DRAW.random() < .7 else text(parts=2)
                         for _ in range(DRAW.randint(1, 5))})
        t = tokenizer(None if i % 3 else NORMALIZERS[i // 3], i % 4 == 3, tokens)
        file = json.loads(t.to_str())
        texts = [text(tokens) for _ in range(14)]
        cases = [[x, encoded(t, x, False), encoded(t, x, True)] for x in texts]
        golden["tokenizers"].append({key: file[key] for key in
                                     ("added_tokens", "normalizer", "pre_tokenizer")}
                                    | {"cases": [c for c in cases if None not in c]})
    path = pathlib.Path(__file__).parents[2] / "test/golden/normalize.json"
    path.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
