#!/usr/bin/env python3
"""Compares the rules of corpus_rules.cpp with those of datatrove 0.10 on the same documents: the
verdict and the first reason of each, and the speed of both in one run.

    pip install datatrove[processing] trafilatura zstandard
    make build/bench_rules
    python dev/bench/datatrove_rules.py --data ../shared/data --folder build/datatrove_rules

The documents: reviews, speeches, news, encyclopedia articles, plays, word problems, declarations in
30 languages, the text of real web pages (by trafilatura, and all their text), and made-up changes of
these, so that each rule is tripped by 200 documents or more. Documents of more than 100,000 words
take datatrove some minutes: --long 0 leaves them out. Results of datatrove are kept in the folder;
remove them to run it again.
"""

import argparse
import collections
import json
import random
import re
import subprocess
import time
from pathlib import Path

REASONS = {  # datatrove's reason: our rule
    "kept": "kept",
    "empty": "min-characters",
    "dup_para_frac": "max-duplicate-paragraphs",
    "dup_para_char_frac": "max-duplicate-paragraph-characters",
    "dup_line_frac": "max-duplicate-lines",
    "dup_line_char_frac": "max-duplicate-line-characters",
    **{f"top_{n}_gram": f"max-top-{n}gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"max-duplicate-{n}gram" for n in range(5, 11)},
    "gopher_short_doc": "min-words",
    "gopher_long_doc": "max-words",
    "gopher_below_avg_threshold": "min-mean-word-length",
    "gopher_above_avg_threshold": "max-mean-word-length",
    "gopher_too_many_hashes": "max-hashes",
    "gopher_too_many_ellipsis": "max-ellipses",
    "gopher_too_many_bullets": "max-bullet-lines",
    "gopher_too_many_end_ellipsis": "max-ellipsis-lines",
    "gopher_below_alpha_threshold": "min-alphabetic-words",
    "gopher_enough_stop_words": "min-stop-words",
    "lorem_ipsum": "max-lorem-ipsum-lines",
    "curly_bracket": "max-curly-bracket-lines",
    "too_few_sentences": "min-sentences",
    "line_punct_ratio": "min-stop-character-lines",
    "short_line_ratio": "max-short-lines",
    "char_dup_ratio": "max-duplicate-characters",
    "list_ratio": "max-newlines",
}


def datatrove_filters():
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    return [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]


def datatrove_reason(filters, text):
    from datatrove.data import Document

    document = Document(text=text, id="0")
    for f in filters:
        result = f.filter(document)
        if result is not True:
            return result[1]
    return "kept"


# --------------------------------------------------------------------------------------------
# Real documents


def read_jsonl(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def groups(pieces, size, join):
    """The pieces, joined to texts of about `size` characters."""
    text, texts = [], []
    for piece in pieces:
        text.append(piece)
        if sum(map(len, text)) >= size:
            texts.append(join.join(text))
            text = []
    return texts


def real_documents(data, folder):
    documents = []

    def add(source, texts):
        documents.extend({"source": source, "text": t} for t in texts if t)

    add("reviews", [d["text"] for d in read_jsonl(data / "reviews/movie_reviews.jsonl")])
    speeches = [d["text"] for d in read_jsonl(data / "text/speeches_and_news.jsonl")]
    add("speeches", groups([p for t in speeches for p in t.split("\n\n")], 6000, "\n\n")[:600])
    for name in ("wikitext2_valid", "wikitext2_test"):
        articles = re.split(r"\n = [^=\n]+ = \n", (data / f"text/{name}.txt").read_text())
        add("encyclopedia", articles)
    plays = (data / "text/tinyshakespeare.txt").read_text()
    add("plays", groups(plays.split("\n\n"), 4000, "\n\n"))
    problems = read_jsonl(data / "gsm8k/train.jsonl")
    add("problems", groups([p["question"] + "\n" + p["answer"] for p in problems], 3000, "\n\n")[:400])
    add("problems", [p["question"] + "\n" + p["answer"] for p in problems[:200]])
    paragraphs = collections.defaultdict(list)
    for d in read_jsonl(data / "languages/udhr.jsonl"):
        paragraphs[d["lang"]].append(d["text"])
    for texts in paragraphs.values():
        add("languages", ["\n".join(texts), " ".join(texts), "\n\n".join(texts[:6])])
    add("pages", page_texts(data / "web/wcxb_dev.jsonl.zst", folder / "pages.jsonl"))
    return documents


def page_texts(path, cache):
    if not cache.exists():
        import io

        import lxml.html
        import trafilatura
        import zstandard

        with open(path, "rb") as packed, open(cache, "w") as out:
            lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(packed), "utf-8")
            for line in lines:
                html = json.loads(line)["html"]
                out.write(json.dumps(trafilatura.extract(html) or "") + "\n")
                try:
                    tree = lxml.html.fromstring(html.encode())
                    for node in tree.xpath("//script|//style|//noscript"):
                        node.drop_tree()
                    everything = re.sub(r"[ \t]*\n\s*", "\n", tree.text_content())
                except Exception:
                    everything = ""
                out.write(json.dumps(everything[:200000]) + "\n")
    return read_jsonl(cache)


# --------------------------------------------------------------------------------------------
# Made-up changes, each of which aims at one rule, from below its threshold to above it


class Changes:
    def __init__(self, documents, seed):
        self.random = random.Random(seed)
        prose = [d["text"] for d in documents if d["source"] in ("reviews", "speeches")]
        self.sentences = []
        for text in prose:
            for s in re.split(r"(?<=[.!?])\s+", text.replace("\n", " ")):
                if 30 < len(s) < 250 and s[-1] in ".!?":
                    self.sentences.append(s.strip())
        self.words = [w for s in self.sentences[:20000] for w in re.findall(r"[a-z]+", s)]
        self.long_words = sorted({w for w in self.words if 10 <= len(w) <= 13})
        self.short_words = sorted({w for w in self.words if 3 <= len(w) <= 6})

    def pick(self, n):
        return self.random.sample(self.sentences, n)

    def uniform(self, a, b):
        return self.random.uniform(a, b)

    def shuffled(self, items):
        self.random.shuffle(items)
        return items

    def repeated(self, unique, share):
        """The items, with copies of some: `share` of all are copies."""
        copies = round(share / (1 - share) * len(unique))
        return self.shuffled(unique + [self.random.choice(unique) for _ in range(copies)])

    def dup_para_frac(self):
        return "\n\n".join(self.repeated(self.pick(20), self.uniform(0.2, 0.45)))

    def dup_para_char_frac(self):
        long = " ".join(self.pick(self.random.randint(3, 6)))
        return "\n\n".join(self.shuffled(self.pick(12) + [long] * 2))

    def dup_line_frac(self):
        return "\n".join(self.repeated(self.pick(20), self.uniform(0.2, 0.45)))

    def dup_line_char_frac(self):
        long = " ".join(self.pick(self.random.randint(3, 6)))
        return "\n".join(self.shuffled(self.pick(12) + [long] * 2))

    def phrase(self, n, low, high):
        """A phrase of n words after some words of a text: its share of characters."""
        words = " ".join(self.pick(12)).split()
        phrase = " ".join(self.random.choices(self.long_words, k=n))
        length, share = len(" ".join(words)), self.uniform(low, high)
        copies = max(2, round(share / (1 - share) * length / (len(phrase) + 1)))
        for place in sorted(self.random.sample(range(len(words)), copies), reverse=True):
            words.insert(place, phrase)
        return " ".join(words)

    def top_2_gram(self):
        return self.phrase(2, 0.17, 0.3)

    def top_3_gram(self):
        return self.phrase(3, 0.175, 0.26)

    def top_4_gram(self):
        return self.phrase(4, 0.155, 0.215)

    def passage(self, low, high):
        """A passage that comes twice: its characters without spaces, a share of the text's."""
        share = self.uniform(low, high)
        text = " ".join(self.pick(30))
        words = " ".join(self.pick(12)).split()
        size, n = 0, 0
        while n < len(words) and size / (len(text) + 2 * (size + n)) < share:
            size += len(words[n])
            n += 1
        passage = " ".join(words[:n])
        middle = len(text) // 2
        return " ".join([passage, text[:middle], passage, text[middle:]])

    def duplicated_5_n_grams(self):
        return self.passage(0.14, 0.19)

    def duplicated_6_n_grams(self):
        return self.passage(0.14, 0.155)

    def duplicated_7_n_grams(self):
        return self.passage(0.13, 0.145)

    def duplicated_8_n_grams(self):
        return self.passage(0.12, 0.135)

    def duplicated_9_n_grams(self):
        return self.passage(0.11, 0.125)

    def duplicated_10_n_grams(self):
        return self.passage(0.1, 0.115)

    def gopher_short_doc(self):
        return " ".join(" ".join(self.pick(12)).split()[: self.random.randint(20, 60)])

    def gopher_long_doc(self):
        return "\n".join(self.pick(self.random.randint(5000, 6500)))

    def gopher_below_avg_threshold(self):
        letters, length = "abcdefghijklmnopqrstuvwxyz", self.uniform(2.3, 3.2)
        words = [
            "".join(self.random.choices(letters, k=max(1, round(self.random.gauss(length, 0.8)))))
            for _ in range(300)
        ]
        return " ".join(words + ["the", "and", "to"]) + "."

    def gopher_above_avg_threshold(self):
        share, lines = self.uniform(0.5, 1), ["The end of that."]
        for sentence in self.pick(25):
            words = re.findall("[a-zA-Z]{4,}", sentence)
            pairs = [a + b if self.random.random() < share else a for a, b in zip(words[::2], words[1::2])]
            lines.append(" ".join(pairs) + ".")
        return " ".join(lines)

    def inserted(self, what, low, high):
        share = self.uniform(low, high)
        words = []
        for word in " ".join(self.pick(20)).split():
            if self.random.random() < share:
                words.append(what() if callable(what) else what)
            words.append(word)
        return " ".join(words)

    def gopher_too_many_hashes(self):
        return self.inserted("#", 0.08, 0.2)

    def gopher_too_many_ellipsis(self):
        return self.inserted("...", 0.08, 0.2)

    def marked_lines(self, begin, end, low, high):
        share = self.uniform(low, high)
        lines = self.pick(30)
        return "\n".join(begin + s + end if self.random.random() < share else s for s in lines)

    def gopher_too_many_bullets(self):
        return self.marked_lines(self.random.choice(["- ", "• ", " -"]), "", 0.88, 1)

    def gopher_too_many_end_ellipsis(self):
        return self.marked_lines("", self.random.choice(["...", "…", " ... "]), 0.2, 0.6)

    def gopher_below_alpha_threshold(self):
        return self.inserted(lambda: str(self.random.randint(0, 9999)), 0.05, 0.3)

    def gopher_enough_stop_words(self):
        stops = ["the", "be", "to", "of", "and", "that", "have", "with"]
        allowed = self.random.sample(stops, self.random.choice([0, 1, 1, 2]))
        words = " ".join(self.pick(25)).lower().split()
        kept = [w for w in words if not any(s in re.findall("[a-z]+", w) for s in stops if s not in allowed)]
        return " ".join(kept)

    def lorem_ipsum(self):
        lines = self.pick(12)
        return "\n".join(self.shuffled(lines + ["Lorem ipsum dolor sit amet."][: self.random.randint(0, 9)]))

    def curly_bracket(self):
        lines = self.pick(12)
        return "\n".join(self.shuffled(lines + ["if (x) { return the value; }"]))

    def too_few_sentences(self):
        return " ".join(self.pick(self.random.randint(3, 6)))

    def line_punct_ratio(self):
        share = self.uniform(0.02, 0.2)
        lines = self.pick(40)
        return "\n".join(s if self.random.random() < share else s.rstrip(".!?") for s in lines)

    def short_line_ratio(self):
        share = self.uniform(0.62, 0.95)
        lines = []
        for s in self.pick(40):
            lines.append(s[:26].rsplit(" ", 1)[0] + "." if self.random.random() < share else s)
        return "\n".join(lines)

    def char_dup_ratio(self):
        lines = self.pick(self.random.randint(30, 140))
        return "\n".join(self.shuffled(lines + [self.random.choice(lines)]))

    def list_ratio(self):
        lines, stops = [], self.uniform(0.13, 0.3)
        for _ in range(60):
            words = self.long_words if self.random.random() < 0.5 else self.short_words
            line = " ".join(self.random.sample(words, 3))
            lines.append(line + "." * (self.random.random() < stops))
        lines.insert(9, "the end of that " + self.random.choice(self.words))
        return "\n".join(lines)


def all_documents(args):
    documents = real_documents(args.data, args.folder)
    changes = Changes(documents, 1)
    for reason in REASONS:
        if reason in ("kept", "empty"):
            continue
        number = args.long if reason == "gopher_long_doc" else args.each
        if reason in ("short_line_ratio", "list_ratio"):  # an earlier rule takes many of these
            number = number * 3 // 2
        make = getattr(changes, reason)
        documents += [{"source": reason, "text": make()} for _ in range(number)]
    documents.append({"source": "empty", "text": ""})
    return documents


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--folder", type=Path, required=True, help="for documents and results")
    parser.add_argument("--binary", default="build/bench_rules")
    parser.add_argument("--each", type=int, default=330, help="made-up documents for each rule")
    parser.add_argument("--long", type=int, default=230, help="documents of over 100,000 words")
    parser.add_argument("--show", type=int, default=3, help="differing documents of each class")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    path, results = args.folder / "documents.jsonl", args.folder / "datatrove.jsonl"
    if not path.exists():
        documents = all_documents(args)
        with open(path, "w") as out:
            for document in documents:
                document["text"] = document["text"].encode("utf-8", "replace").decode()
                out.write(json.dumps(document) + "\n")
    documents = read_jsonl(path)
    if not results.exists():
        filters = datatrove_filters()
        datatrove_reason(filters, "The first call loads the tokenizer.")
        with open(results, "w") as out:
            for document in documents:
                begin = time.process_time()
                reason = datatrove_reason(filters, document["text"])
                seconds = time.process_time() - begin
                out.write(json.dumps({"reason": reason, "seconds": seconds}) + "\n")
    theirs = read_jsonl(results)

    begin = time.monotonic()
    printed = subprocess.run([args.binary, path, "verdicts"], stdout=subprocess.PIPE, check=True)
    ours = [json.loads(line) for line in printed.stdout.decode().split("\n") if line]
    print(f"ours, with reading and printing: {time.monotonic() - begin:.1f} s")
    assert len(ours) == len(theirs) == len(documents)

    same, verdicts, by_reason, classes = 0, 0, collections.Counter(), collections.defaultdict(list)
    agreed = collections.Counter()
    for document, a, b in zip(documents, theirs, ours):
        expected = REASONS[a["reason"]]
        by_reason[expected] += 1
        verdicts += (expected == "kept") == (b["reason"] == "kept")
        if expected == b["reason"]:
            same += 1
            agreed[expected] += 1
        else:
            classes[expected, b["reason"]].append((document, b))
    n = len(documents)
    print(f"{n} documents; same verdict {verdicts / n:.4f}, same first reason {same / n:.4f}")
    for reason in REASONS.values():
        if by_reason[reason]:
            share = agreed[reason] / by_reason[reason]
            print(f"  {reason:36} {by_reason[reason]:5} documents, {share:.3f} with the same reason")
    print("differences: datatrove's reason, ours, documents, their sources")
    for (a, b), found in sorted(classes.items(), key=lambda item: -len(item[1])):
        sources = collections.Counter(document["source"] for document, _ in found)
        print(f"  {a:34} {b:34} {len(found):4}  {dict(sources.most_common(3))}")
    size = sum(len(d["text"].encode()) for d in documents) / 1e6
    seconds = sum(a["seconds"] for a in theirs)
    print(f"datatrove, up to the first reason: {size:.1f} MB in {seconds:.1f} s, {size / seconds:.3f} MB/s")
    rates = subprocess.run([args.binary, path], stdout=subprocess.PIPE, check=True)
    print("cake, all measures:\n" + rates.stdout.decode())


if __name__ == "__main__":
    main()
