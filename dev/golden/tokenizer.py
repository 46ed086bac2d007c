#!/usr/bin/env python3
"""Writes test/golden/tokenizer.json: pieces and ids by Hugging Face's tokenizers.

For each split pattern a small vocabulary is trained on the texts below by `tokenizers`, so that a
tokenizer.json of its making is read; then each text's pieces (in bytes) and ids are kept. Needs
`tokenizers` (0.23 wrote the file; its tables follow Unicode 16).

    python dev/golden/tokenizer.py
"""

import json
import pathlib
import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PREFIX = r"[^\r\n\p{L}\p{N}]?"
SPLITS = {
    "cl100k": CONTRACTION + r"|" + PREFIX + r"\p{L}+|\p{N}{1,3}" + REST,
    "qwen2": CONTRACTION + r"|" + PREFIX + r"\p{L}+|\p{N}" + REST,
    "o200k": PREFIX + UPPER + "*" + LOWER + "+" + CONTRACTION + "?|" + PREFIX + UPPER + "+" + LOWER
    + "*" + CONTRACTION + r"?|\p{N}{1,3}" + REST.replace(r"[\r\n]*", r"[\r\n/]*"),
}

TEXTS = [
    "The kettle sang before the lamp was lit; we'd agreed, hadn't we, that it's best so.",
    "I'LL SAY IT'S FINE, they'Ve said, we'rE sure: x'll'd 'tis 's' ''s DON'T don't",
    "'\u017f \u017f'\u017fa K\u212a's \u00df's \u01c5ab \u02b0x \u00aaB",
    "1 12 123 1234 12345 3.14 1,000,000 \uff11\uff12\uff13\uff14 \u00b2\u00b3\u00bd\u2167 a1b2",
    "a  b   c\t\td\n\n  e \n \n f\r\n\r\n\tg \r\n ",
    "   ", "\n", " \n", "\n ", "  x", "\u00a0word \u3000word\u2028word\u0085word\u180e \u200b\ufeff",
    "\x1c\x1d\x00\x01 a\x0bb\x0cc", "!!\r\n\r\ny !\n/ //\n\n/ ?!/x ...\n...",
    "e\u0301 \u0301ABC !\u0301ab \u0301\u0301 \u0915\u094d\u0937 \u0939\u093f\u0928\u094d\u0926\u0940",
    "A\u65e5B \u65e5ABC \u65e5Abc ABC\u65e5 aB\u65e5c helloWORLD HelloWorld iPhone XMLHttp",
    "\u6f22\u5b57\u3068\u304b\u306a \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u0639\u0631\u0628\u064a",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0393\u03b5\u03b9\u03ac \u0541\u0561\u0575",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001e900\U0001e922",
    "for (int i = 0; i < n; i++) {\n    s += a[i] * 0x1F; // sum\n}\n\n\n#define X(a) __x##a\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabaaaaaaaabaab" + "=" * 40 + " " * 40 + "z" + "\n" * 9 + "q",
]


def random_texts():
    """Short mixtures of all classes: what happens at the ends of a text matters most."""
    draw = random.Random(5)
    alphabet = list("aabBzZ   \n\n\r\t''sStTlLdDmMvVrReE/!?.,019") + list(
        "\u0301\u65e5\u672c\u017f\u00df\u01c5\u02b0\u00aa\u00a0\u3000\u2028\x85\x1c\u200b\u00bd\u0663"
        "\u2167\u00e9\u00c9\U0001f600\U0001e900\U0001e922\u1c89\ua7da"
    )
    return ["".join(draw.choices(alphabet, k=draw.randint(1, 14))) for _ in range(150)]


def pre_tokenizer(pattern):
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == "gpt2_digits":
        first = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    first = pre_tokenizers.Split(Regex(SPLITS[pattern]), "isolated")
    second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([first, second])


def main():
    texts = TEXTS + random_texts()
    out = {"texts": texts, "tokenizers": []}
    for pattern in ["gpt2", "gpt2_digits", "cl100k", "qwen2", "o200k"]:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer(pattern)
        tokenizer.decoder = decoders.ByteLevel()
        if pattern == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        # A byte is one character of ByteLevel's spelling.
        pieces = [[len(p) for p, _ in tokenizer.pre_tokenizer.pre_tokenize_str(t)] for t in texts]
        ids = [tokenizer.encode(t).ids for t in texts]
        out["tokenizers"].append(
            {"pattern": pattern, "file": json.loads(tokenizer.to_str()), "pieces": pieces, "ids": ids}
        )
    path = pathlib.Path(__file__).parents[2] / "test" / "golden" / "tokenizer.json"
    text = json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n"
    path.write_bytes(text.encode())


if __name__ == "__main__":
    main()
