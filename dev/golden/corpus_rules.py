#!/usr/bin/env python3
"""Writes test/golden/corpus_rules.jsonl: made-up documents with the values and the first reason that
datatrove 0.10 finds for them, and the text that its C4 filter leaves.

    pip install datatrove[processing]
    python dev/golden/corpus_rules.py
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from datatrove_rules import REASONS, datatrove_filters, datatrove_reason

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS
from datatrove.pipeline.filters.gopher_repetition_filter import (
    find_all_duplicate,
    find_duplicates,
    find_top_duplicate,
    get_n_grams,
)
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION, split_into_words

import re

NOUNS = "river baker lantern teacher garden engine letter harbour winter pencil doctor valley".split()
VERBS = "finds carries paints remembers mends follows sells watches describes loses".split()
PLACES = "the old mill|a quiet street|the market|her brother's house|the station|a distant town".split("|")
ENDS = ". . . . ! ? .\" … ; ...".split()


class Writer:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def sentence(self):
        r = self.random
        a, b, c = r.choice(NOUNS), r.choice(NOUNS), r.choice(NOUNS)
        text = f"The {a} {r.choice(VERBS)} the {b} near {r.choice(PLACES)}"
        if r.random() < 0.4:
            text += f", and {r.choice(['it is', 'that was', 'they have', 'we have'])} {r.randint(2, 9999)} {c}s"
        if r.random() < 0.2:
            text += f" (the {c}'s {r.choice(['well-known', 'half-empty', 'third'])} {a})"
        if r.random() < 0.2:
            text += f"; she doesn't {r.choice(['know', 'mind'])} and he'll {r.choice(['wait', 'come'])}"
        return text + r.choice(ENDS)

    def sentences(self, n):
        return [self.sentence() for _ in range(n)]


def documents():
    yield ""
    yield "\n\n \n"
    yield "I am your father.\n" * 4
    yield "I am Frank, I am Frank, I am Frank"
    yield "interconnection " * 20
    yield "# comment " * 20
    yield "... comment " * 20
    yield "to be or not to be that is"
    for seed in range(40):
        w = Writer(seed)
        r = w.random
        lines = w.sentences(r.choice([3, 6, 9, 12]))
        kind = seed % 20
        if kind == 0:
            lines += r.choices(lines, k=4)
        elif kind == 1:
            lines = [s.rstrip('.!?"…') for s in lines]
        elif kind == 2:
            lines = ["- " + s for s in lines]
        elif kind == 3:
            lines = [s + "..." for s in lines]
        elif kind == 4:
            lines.insert(1, "Please enable JavaScript to see this page.")
            lines.insert(3, "We use cookies to make the page better.")
            lines.insert(4, "Home [edit]")
            lines[2] += "[12] [citation needed]"
        elif kind == 5:
            lines.append("Lorem ipsum dolor sit amet, the rest is filled in later.")
        elif kind == 6:
            lines.append("void main() { return; }")
        elif kind == 7:
            lines = [" ".join(lines), "", " ".join(w.sentences(3)), "", " ".join(lines)]
        elif kind == 8:
            lines = [s.replace("a", "ä").replace("The", "Ein größerer") for s in lines]
        elif kind == 9:
            lines = [f"{s} № {r.randint(1, 99)} # {r.randint(1, 99)} % 12:30 {r.random():.3f}" for s in lines]
        elif kind == 10:
            passage = " ".join(w.sentences(2))
            lines = [passage] + w.sentences(14) + ["And then: " + passage]
        elif kind == 11:
            lines = [s[:24].rsplit(" ", 1)[0] + "." for s in lines]
        elif kind == 12:
            lines = ["\t" + s + " \u00a0" for s in lines]
        elif kind == 13:
            lines = [s.replace("the", "a").replace("The", "A").replace("and", "or") for s in lines]
        elif kind == 14:
            lines = ["Дом стоит у реки. " + s for s in lines]
        elif kind == 15:
            lines = ["彼は家に帰った。" + s for s in lines] + ["東京は大きい。"]
        text = ("\n\n" if seed % 3 == 0 else "\n").join(lines)
        if kind == 16:
            text = text.replace("\n", "\r\n")
        elif kind == 17:
            text = text.replace("\n", "\u2028")
        elif kind == 18:
            text = "\n" + text + "\n\n"
        yield text


def ratio(a, b):
    return a / b if b else 0


def values(text):
    v = {"characters": len(text)}
    paragraphs = re.split(r"\n{2,}", text.strip())
    number, size = find_duplicates(paragraphs)
    v["duplicate_paragraphs"] = number / len(paragraphs)
    v["duplicate_paragraph_characters"] = ratio(size, len(text))
    lines = re.split("\n+", text)
    number, size = find_duplicates(lines)
    v["duplicate_lines"] = number / len(lines)
    v["duplicate_line_characters"] = ratio(size, len(text))
    words = split_into_words(text)
    for n in (2, 3, 4):
        grams = get_n_grams(words, n)
        v[f"top_{n}gram"] = find_top_duplicate(grams) / len(text) if grams else 0
    for n in range(5, 11):
        v[f"duplicate_{n}gram"] = ratio(find_all_duplicate(words, n), len(text))
    proper = [w for w in words if any(c not in PUNCTUATION_SET for c in w)]
    v["words"] = len(proper)
    v["mean_word_length"] = ratio(sum(map(len, proper)), len(proper))
    v["hashes"] = ratio(text.count("#"), len(words))
    v["ellipses"] = ratio(text.count("...") + text.count("…"), len(words))
    lines = text.splitlines()
    v["bullet_lines"] = ratio(sum(s.lstrip().startswith(("•", "-")) for s in lines), len(lines))
    v["ellipsis_lines"] = ratio(sum(s.rstrip().endswith(("...", "…")) for s in lines), len(lines))
    v["alphabetic_words"] = ratio(sum(any(c.isalpha() for c in w) for w in words), len(words))
    v["stop_words"] = len(set(STOP_WORDS) & set(words))

    kept = Document(text=text, id="0")
    c4 = C4QualityFilter(
        filter_no_terminal_punct=False,
        min_num_sentences=-1,
        filter_lorem_ipsum=False,
        filter_curly_bracket=False,
    )
    c4.filter(kept)
    kept = kept.text
    lines = [s for s in kept.split("\n") if s.strip()]
    plain = kept.replace("\n", "")
    v["stop_character_lines"] = ratio(sum(s.endswith(tuple(TERMINAL_PUNCTUATION)) for s in lines), len(lines))
    v["short_lines"] = ratio(sum(len(s) <= 30 for s in lines), len(lines))
    v["duplicate_characters"] = ratio(find_duplicates(lines)[1], len(plain))
    v["newlines"] = ratio(kept.count("\n"), len(split_into_words(kept)))
    return v, kept


def main():
    filters = datatrove_filters()
    path = Path(__file__).parent.parent.parent / "test/golden/corpus_rules.jsonl"
    with open(path, "w") as out:
        for text in documents():
            v, kept = values(text)
            reason = REASONS[datatrove_reason(filters, text)]
            line = {"text": text, "kept": kept, "reason": reason, "values": v}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
