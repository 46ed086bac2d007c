#!/usr/bin/env python3
"""Compares how ./bpe splits text with Python's regex and Hugging Face's tokenizers, and writes
test/golden/split.json.

    make build/split_pieces
    python dev/golden/split.py golden             write the golden
    python dev/golden/split.py compare            every published pre-tokenizer, and 500 random
                                                  expressions, on 100,000 random strings
    python dev/golden/split.py compare 3 100 1000 seed, random expressions, strings

Needs regex, tokenizers and unicodedata2 (16.0). Expressions are compared with the package regex in
its version 1 (nested sets, full case-folding), steps in a sequence with tokenizers. Where regex differs
on a random expression, the Oniguruma of tokenizers is asked too: regex takes a set that is empty for
one of everything, and errs with some sequences of $ and (?i:). What their tables have in another way is left out: characters that Unicode has since 17.0, and U+0295, which
was a lower-case letter until then.
"""

import functools
import json
import pathlib
import random
import re
import subprocess
import sys

import regex
import unicodedata2
from tokenizers import Regex, pre_tokenizers

ROOT = pathlib.Path(__file__).parents[2]
TOOL = ROOT / "build" / "split_pieces"

# -------------------------------------------------------------------------------------------------
# Published pre-tokenizers

S = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
S_SPELLED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PREFIX = r"[^\r\n\p{L}\p{N}]?"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r"| ?[^\s\p{L}\p{N}]+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = S + "|" + PREFIX + r"\p{L}+|\p{N}{1,3}" + SIGNS + r"[\r\n]*" + SPACES
QWEN2 = CL100K.replace("{1,3}", "")


def cased(upper, lower, contraction, digits, newlines):
    return (PREFIX + upper + "*" + lower + "+" + contraction + "|" + PREFIX + upper + "+" + lower + "*"
            + contraction + "|" + digits + SIGNS + newlines + SPACES)


O200K = cased(UPPER, LOWER, S + "?", r"\p{N}{1,3}", r"[\r\n/]*")
NOT_HAN = r"&&[^\p{Han}]]"
KIMI = r"[\p{Han}]+|" + cased(UPPER[:-1] + NOT_HAN, LOWER[:-1] + NOT_HAN, S + "?", r"\p{N}{1,3}",
                              r"[\r\n]*")
CASED_BY_LOOKS = cased(r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))", S_SPELLED + "?",
                       r"\p{N}{1,3}", r"[\r\n/]*")
PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
DEEPSEEK3 = (PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
             + SPACES)
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbe"
    "ῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "\ufb00-\ufb06\ufb13-\ufb17Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
CASCADE = "".join(r"|\s{%d}(?!\S)" % n for n in (512, 256, 128, 64, 32, 16, 8, 4))

# One expression, as a tokenizer.json has it.
EXPRESSIONS = {
    "gpt2": GPT2,  # GPT-2, RoBERTa, MPT, GPT-NeoX, OLMo 1, Phi 1 and 2, BLOOM's cousins
    "llama3": CL100K,  # Llama 3, DBRX, Phi-4, OLMo 2 and 3, GLM-4, Granite 4, SmolLM3
    "glm4": CL100K.replace(S, S_SPELLED),
    "qwen2": QWEN2,  # Qwen 2, 2.5, 3, StableLM 2, Grok 2, Hunyuan
    "qwen3.5": S + "|" + PREFIX + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES,
    "o200k": O200K,  # Llama 4, gpt-oss, MiniMax M2
    "o200k by look-ahead": CASED_BY_LOOKS,  # llama.cpp's
    "granite embedding": CASED_BY_LOOKS.replace(r"[\p{L}]", r"[\p{L}\p{M}]"),
    "tekken": cased(UPPER, LOWER, "", r"\p{N}", r"[\r\n/]*"),  # Mistral Nemo and later, Nemotron 3
    "kimi": KIMI,
    "bloom": BLOOM,  # BLOOM, Poro, GPT-3 Finnish; Viking: then Digits
    "seed coder": S + "|" + PREFIX + r"\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + SPACES,
    "bailing": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "jais2": S + "|" + PREFIX + r"\p{L}+|\p{N}{1,3}" + SIGNS + r"[\r\n]*|\s*[\r\n]+" + CASCADE + r"|\s{1,2}(?!\S)|\s{1}",
    "exaone moe": S + "|" + PREFIX + r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}" + SIGNS + r"[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    "minicpm5": CL100K.replace("{1,3}", "+"),
    "gpt2 by digits": GPT2.replace(r" ?\p{N}+", r"\p{N}"),
    "no contractions": QWEN2[len(S) + 1:],
    "gemma4": r"[^\n]+|[\n]+",
    "whitespace": r"\S+",
    "chameleon image": r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    "chameleon spaces": r"([\t\n]|    |  )",
    "deepseek 3": DEEPSEEK3,
    "deepseek 3 han": "[一-龥\u3040-ゟ゠-ヿ]+",
    "deepseek letters": r"\s?[" + DEEPSEEK_LETTERS + "]+",
    "deepseek signs": r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    "deepseek spaces": r"\s+$",
    "deepseek han": "[一-龥ࠀ-一가-퟿]+",
    "youtu": "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
    "afmoe": "[一-鿿㐀-䶿豈-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+",
    "falcon signs": r"[\p{P}\$\+<=>\^~\|`]+",
    "three digits": "[0-9][0-9][0-9]",
}
# As tiktoken reads them.
TIKTOKEN = {
    "r50k of tiktoken": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k of tiktoken": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "cl100k, older": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "rustbpe": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
}


def split(text, behavior="isolated", invert=False):
    return {"kind": "regex", "text": text, "behavior": behavior, "invert": invert}


def literal(text, behavior="isolated", invert=False):
    return {"kind": "literal", "text": text, "behavior": behavior, "invert": invert}


BYTE_LEVEL = {"kind": "pattern", "text": "gpt2"}
DIGITS = {"kind": "digits", "individual_digits": True}
OF_BYTES = {"of_bytes": True}  # behind ByteLevel
DIGIT_RUNS = {"kind": "digits", "individual_digits": False}
# Steps in turn, as tokenizer.json has them.
SEQUENCES = {
    # StarCoder, SmolLM 1 and 2, Command R, Refact, CodeShell, EXAONE 3, Minerva
    "digits, gpt2": [DIGITS, BYTE_LEVEL],
    "deepseek 3, r1": [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK3)],
    "deepseek llm": [split("[\r\n]"), split(r"\s?[" + DEEPSEEK_LETTERS + "]+"),
                     split(r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"), split(r"\s+$"),
                     split("[一-龥ࠀ-一가-퟿]+"), DIGITS],
    "deepseek coder": [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"),
                       split("[一-龥ࠀ-一가-퟿]+"), DIGITS],
    "falcon": [{"kind": "punctuation", "behavior": "contiguous"}, BYTE_LEVEL, DIGIT_RUNS | OF_BYTES,
               split("[0-9][0-9][0-9]") | OF_BYTES],
    "falcon without its bytes": [{"kind": "punctuation", "behavior": "contiguous"}, BYTE_LEVEL],
    "falcon digits": [DIGIT_RUNS, split("[0-9][0-9][0-9]")],
    "viking": [split(BLOOM), DIGITS],
    "chameleon": [split("<sentinel:[0-9]+>"), split("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
                  split(r"([\t\n]|    |  )"), DIGITS, {"kind": "punctuation"}, BYTE_LEVEL],
    "minicpm5": [split(r"\p{N}{1,3}"), split(CL100K.replace("{1,3}", "+"))],
    "youtu": [split(EXPRESSIONS["youtu"]), split(O200K.replace("{1,3}", ""))],
    "afmoe": [split(EXPRESSIONS["afmoe"]), split(DEEPSEEK3)],
    "nemotron, phi-4": [split(CL100K, "removed", True)],
    "gemma": [literal(" ", "merged_with_previous")],
    "merged with next": [split(r"\s", "merged_with_next")],
    "merged with previous": [split(r"\p{P}", "merged_with_previous"), DIGITS],
    "merged with previous, inverted": [split(r"\p{L}+", "merged_with_previous", True)],
    "merged with next, inverted": [split(r"\p{L}+", "merged_with_next", True)],
    "contiguous": [split(r"\s|a", "contiguous"), literal("the", "contiguous", True)],
    "removed": [split(r"\s+", "removed"), {"kind": "punctuation", "behavior": "removed"}],
    "removed, inverted": [split(r"\p{L}+", "removed", True)],
    "literal": [literal("'s"), literal("  ", "contiguous"), literal(".", "merged_with_next")],
    "empty literal": [literal("", "contiguous")],
    "empty matches": [split("x*"), split("(?=b)")],
    "empty matches, contiguous": [split("a*", "contiguous"), split("|b", "merged_with_previous")],
}

# -------------------------------------------------------------------------------------------------
# Texts

WORDS = ["the", "it's", "DON'T", "I'LL", "'ve", "x'll'd", "helloWORLD", "iPhone", "a1b2", "3.14", "12345",
         "    ", "\r\n", "\n\n", "IMGIMGABZ", "<sentinel:12>", "http://x.y/z?q=1", "日本語", "हिन्दी", "ภาษาไทย",
         "한국어", "العربية", "e\u0301", "…", "“q”", "--", "...", "\u00a0", "\u3000", "１２３４", "²³½Ⅷ", "👩\u200d👩\u200d👧",
         "🇩🇪", "ǅ", "ʰ", "ß", "ſ", "\u212a", "ﬁ", "İı", "µ", "Ω", "ﬃ", "\u1e9e", "か", "ガ", "ㄱ", "ㄅ", "、", "।", "。"]
CHARACTERS = list("aabcdeBSTZxyz   \n\n\r\t''/!?.,-_(|)[]{}$^*+=<>~`#@%&\"\\:;0129sStTmMlLvVrReEdDkKiI")
CORNERS = ["\0", "\x0b", "\x0c", "\x1c", "\x7f", "\x85", "\u200b", "\ufeff", "\u180e", "\u2028", "\u0301", "\u0345",
           "日", "本", "é", "É", "Ж", "ж", "½", "٣", "😀", "\U0001e900", "\U0001e922", "\u24b6", "\u2160", "\u2e80",
           "\u3007", "\U00020000", "\ud7ff", "\ue000", "\U0010ffff", "\u0e01", "\u0378", "ⓐ", "€", "©", "\u1c89", "\ua7da"]


def good(c):
    """Whether all tables agree on a character."""
    if 0xD800 <= c < 0xE000 or c == 0x295:
        return False
    return unicodedata2.category(chr(c)) != "Cn" or regex.match(r"\p{Cn}", chr(c)) is not None


def random_text(draw):
    out = ""
    for _ in range(draw.randint(1, 12)):
        kind = draw.random()
        if kind < 0.6:
            out += draw.choice(CHARACTERS)
        elif kind < 0.75:
            out += draw.choice(CORNERS)
        elif kind < 0.9:
            out += draw.choice(WORDS)
        elif kind < 0.95:
            out += draw.choice(CHARACTERS) * draw.randint(2, 8)
        else:
            c = draw.randrange(0x110000 if kind < 0.96 else 0x3100)
            out += chr(c) if good(c) else "a"
    return out


# -------------------------------------------------------------------------------------------------
# Random expressions of the subset. None repeats what can match nothing.

CLASSES = [r"\s", r"\S", r"\d", r"\D", r"\p{L}", r"\P{L}", r"\p{^N}", r"\p{Lu}", r"\p{Ll}", r"\p{N}", r"\p{P}", r"\p{S}",
           r"\p{M}", r"\p{Han}", r"\P{Han}", r"\p{Z}", r"\p{C}", r"\p{Nd}", r"\p{Lo}", r"\p{Sm}", "."]
ITEMS = CLASSES[:-1] + ["a-z", "A-Z", "0-9", "abc", "sdmt", r"\r\n", r"\t", " ", ".,!?", r"\-", r"\]", r"\x41", r"\u00e9",
                        "一-龥", "é", "'", r"\x{1F600}"]
LITERALS = list("aabcSTesx '.,!019/_-") + [r"\n", r"\r", r"\t", r"\.", r"\$", r"\[", "é", "日", r"\x0b", "<", "=", "#", "&"]
LOOSE = ["'s", "'ll", "ve", "re", "d", "m", "ab", "k", "x", "AB", "r1", "."]


def random_class(draw, depth=0):
    if draw.random() < 0.3:
        return draw.choice(CLASSES)
    if draw.random() < 0.3:  # a negated class of negated ones may be empty: Python's has all then
        return "[^" + "".join(draw.choice([i for i in ITEMS if not re.match(r"\\[SDP]|.*\^", i)])
                              for _ in range(draw.randint(1, 4))) + "]"
    items = "".join(draw.choice(ITEMS) for _ in range(draw.randint(1, 4)))
    if depth < 2 and draw.random() < 0.15:
        items += random_class(draw, depth + 1) if draw.random() < 0.5 else draw.choice(["[xyz]", "[^a]"])
    if "." in items.replace(".,!?", ""):
        items = items.replace(".", "")
    if depth < 1 and draw.random() < 0.15:
        items += "&&[^" + draw.choice(ITEMS) + "]"
    items = items or "a"
    return "[" + items + "]"


def quantifier(draw):
    low = draw.randint(0, 3)
    return draw.choice(["*", "+", "?", "+", "+", "{%d}" % max(low, 1), "{%d,}" % low, "{%d,%d}" % (low, low + draw.randint(1, 3))])


def random_expression(draw, depth=0):
    """(expression, whether it can match nothing)"""
    alternatives = [random_sequence(draw, depth) for _ in range(draw.choice([1, 1, 2, 3] if depth else [1, 2, 3, 4, 5]))]
    return "|".join(a for a, _ in alternatives), any(e for _, e in alternatives)


def random_sequence(draw, depth):
    out, nothing = "", True
    for _ in range(draw.randint(1, 4 if depth == 0 else 3)):
        kind = draw.random()
        empty, single = False, True
        if kind < 0.4:
            part = random_class(draw)
        elif kind < 0.65:
            part = draw.choice(LITERALS)
        elif kind < 0.78 and depth < 3:
            inner, empty = random_expression(draw, depth + 1)
            part, single = draw.choice(["(?:", "("]) + inner + ")", False
        elif kind < 0.86:
            part, single = "(?i:" + "|".join(draw.sample(LOOSE, draw.randint(1, 3))) + ")", False
        elif kind < 0.96:
            look = draw.choice([r"(?!\S)", r"(?=\S)", r"(?!\s)", "(?=[a-z])", r"(?!\p{L})", r"(?=\p{N}|\s)", "$", r"\z",
                                "(?!" + random_class(draw) + ")", "(?=" + random_class(draw) + "|x)", r"(?=\s|\z)"])
            out += look
            continue
        else:
            part = draw.choice(["'s", "ab", "aa", " ?", "a*?"])
            empty, single = part in (" ?", "a*?"), False
            out, nothing = out + part, nothing and empty
            continue
        if draw.random() < 0.55:
            q = quantifier(draw)
            if empty and q != "?":
                q = ""
            if q:
                suffix = draw.random()
                if suffix < 0.15 and not re.fullmatch(r"\{\d+\}", q):
                    q += "?"
                elif suffix < 0.35 and single and q in ("*", "+", "?"):
                    q += "+"
                empty = empty or q[0] in "*?" or q.startswith("{0")
                part += q
        out, nothing = out + part, nothing and empty
    return out, nothing


# -------------------------------------------------------------------------------------------------
# The other implementations


def for_python(expression, tiktoken=False):
    """In Python's spelling. Oniguruma's $ is the end of a line."""
    out, in_class, i = "", 0, 0
    while i < len(expression):
        c = expression[i]
        if c == "\\":
            pair = expression[i : i + 2]
            out += r"\Z" if pair == r"\z" else pair
            if expression.startswith(r"\x{", i):
                end = expression.index("}", i)
                out = out[:-2] + "\\U%08x" % int(expression[i + 3 : end], 16)
                i = end - 1
            i += 2
            continue
        in_class += (c == "[") - (c == "]" and in_class > 0)
        out += (r"\Z" if tiktoken else r"(?:\Z|(?=\n))") if c == "$" and not in_class else c
        i += 1
    return regex.compile("(?V1)" + out)


def pieces_of_regex(compiled, text):
    """Lengths of matches and of the text between them; None where a match is empty."""
    out, begin = [], 0
    for match in compiled.finditer(text, timeout=0.5):
        a, b = match.span()
        if a > begin:
            out.append(a - begin)
        if b == a:
            return None
        out.append(b - a)
        begin = b
    if begin < len(text):
        out.append(len(text) - begin)
    return out


def hugging_face(steps):
    behavior = lambda step: step.get("behavior", "isolated")
    made = []
    for step in steps:
        if step["kind"] == "regex":
            made.append(pre_tokenizers.Split(Regex(step["text"]), behavior(step), step.get("invert", False)))
        elif step["kind"] == "literal":
            made.append(pre_tokenizers.Split(step["text"], behavior(step), step.get("invert", False)))
        elif step["kind"] == "digits":
            made.append(pre_tokenizers.Digits(step["individual_digits"]))
        elif step["kind"] == "punctuation":
            made.append(pre_tokenizers.Punctuation(behavior(step)))
        elif is_of_bytes(steps):
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        else:
            made.append(pre_tokenizers.Split(Regex(GPT2), "isolated"))
    return pre_tokenizers.Sequence(made)


def pieces_of_hugging_face(pre_tokenizer, text, in_bytes=False):
    """Lengths in characters; or in bytes, which are the characters behind ByteLevel."""
    return [len(p) if in_bytes else b - a for p, (a, b) in pre_tokenizer.pre_tokenize_str(text)]


def is_of_bytes(steps):
    return any(s.get("of_bytes") for s in steps)


@functools.cache
def known_to_hugging_face(c):
    """Its table of punctuation is of an old version of Unicode."""
    found = len(pre_tokenizers.Punctuation("removed").pre_tokenize_str("a" + c + "a")) == 2
    return ord(c) < 0x80 or found == (unicodedata2.category(c)[0] == "P")


class Tool:
    def __init__(self, texts):
        self.texts = "".join(json.dumps(t) + "\n" for t in texts).encode()

    def pieces(self, pre_tokenizer):
        """A list of lengths for each text, or the error."""
        done = subprocess.run([TOOL], input=json.dumps(pre_tokenizer).encode() + b"\n" + self.texts,
                              stdout=subprocess.PIPE, check=True)
        lines = done.stdout.decode().split("\n")
        if lines[0] != "ok":
            return lines[0]
        return lines[1:-1]


def compare(name, ours, texts, other, shown=3, arbiter=None):
    """How many texts differ, how many of them from the arbiter too, and how many were compared."""
    wrong = wrong_twice = compared = slow = 0
    for text, line in zip(texts, ours, strict=True):
        try:
            expected = other(text)
        except TimeoutError:  # backtracking without end
            slow += 1
            if slow > 5:
                break
            continue
        if expected is None:
            continue
        compared += 1
        if line != " ".join(map(str, expected)):
            wrong += 1
            if arbiter and line == " ".join(map(str, pieces_of_hugging_face(arbiter, text))):
                continue
            wrong_twice += 1
            if wrong_twice <= shown:
                print(f"  {name}: {text!r}: found {line}, expected {expected}", flush=True)
    return wrong, wrong_twice, compared


def compare_all(seed, expressions, strings):
    draw = random.Random(seed)
    texts = [random_text(draw) for _ in range(strings)]
    tool = Tool(texts)
    total = wrong = 0
    for table, tiktoken in ((EXPRESSIONS, False), (TIKTOKEN, True)):
        for name, expression in table.items():
            ours = tool.pieces({"regex": expression, "tiktoken": tiktoken})
            if isinstance(ours, str):
                print("REFUSED", name, ours)
                continue
            compiled = for_python(expression, tiktoken)
            w, _, n = compare(name, ours, texts, lambda t: pieces_of_regex(compiled, t))
            wrong, total = wrong + w, total + n
    print(f"published expressions: {len(EXPRESSIONS) + len(TIKTOKEN)}, {total} texts, {wrong} differ", flush=True)

    usable = [t for t in texts if all(map(known_to_hugging_face, t))]
    hf_tool, total, wrong = Tool(usable), 0, 0
    for name, steps in SEQUENCES.items():
        ours = hf_tool.pieces({"steps": steps, "bytes": is_of_bytes(steps)})
        if isinstance(ours, str):
            print("REFUSED", name, ours)
            continue
        other = hugging_face(steps)
        w, _, n = compare(name, ours, usable, lambda t: pieces_of_hugging_face(other, t, is_of_bytes(steps)))
        wrong, total = wrong + w, total + n
    print(f"sequences: {len(SEQUENCES)}, {total} texts, {wrong} differ", flush=True)

    done = total = wrong = wrong_twice = 0
    refused = {}
    while done < expressions:
        if done % 50 == 0:
            print(f"  {done} random expressions so far, {total} texts", flush=True)
        expression, nothing = random_expression(draw)
        if nothing:
            continue
        compiled = for_python(expression)
        ours = tool.pieces({"regex": expression})
        if isinstance(ours, str):
            reason = ours[ours.rfind(", expected") + 11 :]
            refused.setdefault(reason, expression)
            continue
        try:
            arbiter = pre_tokenizers.Split(Regex(expression), "isolated")
        except Exception as error:
            print(f"  Oniguruma refuses {expression}: {error}", flush=True)
            arbiter = None
        w, w2, n = compare(expression, ours, texts, lambda t: pieces_of_regex(compiled, t), arbiter=arbiter)
        done, wrong, wrong_twice, total = done + 1, wrong + w, wrong_twice + w2, total + n
        if w > w2:
            print(f"  Oniguruma finds what ./bpe finds, and regex does not, in {w - w2} texts: {expression}", flush=True)
    print(f"random expressions: {done}, {total} texts, {wrong} differ from regex, {wrong_twice} of them from "
          f"Oniguruma too; refused for: {refused}", flush=True)


# -------------------------------------------------------------------------------------------------


def write_golden():
    draw = random.Random(7)
    texts = [random_text(draw) for _ in range(60)]
    out = {"texts": texts, "expressions": [], "sequences": []}
    for table, tiktoken in ((EXPRESSIONS, False), (TIKTOKEN, True)):
        for name, expression in table.items():
            compiled = for_python(expression, tiktoken)
            out["expressions"].append({"name": name, "regex": expression, "tiktoken": tiktoken,
                                       "pieces": [pieces_of_regex(compiled, t) for t in texts]})
    while len(out["expressions"]) < len(EXPRESSIONS) + len(TIKTOKEN) + 60:
        expression, nothing = random_expression(draw)
        if nothing or len(expression) > 70:
            continue
        if isinstance(Tool([]).pieces({"regex": expression}), str):
            continue
        compiled = for_python(expression)
        chosen = [pieces_of_regex(compiled, t) for t in texts[:20]]
        out["expressions"].append({"name": "random", "regex": expression, "tiktoken": False, "pieces": chosen})
    for name, steps in SEQUENCES.items():
        other = hugging_face(steps)
        out["sequences"].append({"name": name, "steps": steps,
                                 "pieces": [pieces_of_hugging_face(other, t, is_of_bytes(steps)) if all(map(known_to_hugging_face, t)) else None
                                            for t in texts]})
    # A list of lengths as a string: in half the space.
    for entry in out["expressions"] + out["sequences"]:
        entry["pieces"] = [None if p is None else " ".join(map(str, p)) for p in entry["pieces"]]
    path = ROOT / "test" / "golden" / "split.json"
    path.write_bytes((json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    if sys.argv[1:2] == ["golden"]:
        write_golden()
    elif sys.argv[1:2] == ["compare"]:
        seed, expressions, strings = (list(map(int, sys.argv[2:])) + [1, 500, 100_000][len(sys.argv) - 2 :])[:3]
        compare_all(seed, expressions, strings)
    else:
        sys.exit(__doc__)
