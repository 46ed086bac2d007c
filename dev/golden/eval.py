#!/usr/bin/env python3
"""Writes test/golden/eval_*: a tiny model, items in the field's formats, lm-evaluation-harness's scores.

    python dev/golden/eval.py [--out test/golden]

eval_model/ is a Hugging Face directory with random weights and a byte-level BPE. eval_hellaswag,
eval_arc, eval_mmlu (.jsonl) are items made of random words in the formats of those benchmarks, with
the marks, capitals and spaces that their preprocessing is about. eval_scores.json has what lm-eval's
own task definitions make of them, zero and two shots, and the bits per byte of eval_text.jsonl.
Needs lm-eval (0.4.13 wrote the files), transformers and datasets; nothing is downloaded.
"""

import argparse
import json
import math
import os
import pathlib
import random
import sys
import tempfile

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = ("the a lamp river walks Then slowly opens door, because under caf\u00e9 of green stone and "
         "sings. Why not? it's twelve 12 7 boats drift (quietly) over \u00fcber hills; nobody knows").split()
ITEMS = 40


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write_lines(path, objects):
    path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects))


def write_items(out, rng):
    hellaswag, arc, mmlu = [], [], []
    for i in range(ITEMS):
        endings = [sentence(rng, 1, 9) for _ in range(4)]
        if i % 3 == 0:
            endings[1] = "[step] " + endings[1] + " [title] Then  it ends. [substeps] Go on."
        ctx_a = sentence(rng, 2, 8) + (" [header] how to wait [title] Begin." if i % 4 == 0 else "")
        ctx_b = ["", "the LAMP", "Nobody Knows"][i % 3]
        hellaswag.append(dict(ind=i, activity_label=rng.choice(["Boats", "Home and Garden"]),
                              ctx_a=ctx_a, ctx_b=ctx_b, ctx=ctx_a + " " + ctx_b, endings=endings,
                              label=str(rng.randrange(4)), split="val"))
        count = rng.choice([3, 4, 4, 5])
        labels = ["1", "2", "3", "4", "5"] if i % 5 == 0 else list("ABCDE")
        arc.append(dict(id=f"item_{i}", question=sentence(rng, 3, 12) + "?",
                        choices=dict(text=[sentence(rng, 1, 6) for _ in range(count)],
                                     label=labels[:count]),
                        answerKey=labels[rng.randrange(count)]))
        mmlu.append(dict(question=" " * (i % 3) + sentence(rng, 3, 12) + "?\n", subject="marine_biology",
                         choices=[sentence(rng, 1, 6) for _ in range(4)], answer=rng.randrange(4)))
    write_lines(out / "eval_hellaswag.jsonl", hellaswag)
    write_lines(out / "eval_arc.jsonl", arc)
    write_lines(out / "eval_mmlu.jsonl", mmlu)
    texts = [sentence(rng, 3, 30), sentence(rng, 400, 400), sentence(rng, 250, 260)]
    write_lines(out / "eval_text.jsonl", [dict(text=t) for t in texts])
    return texts


def make_model(path):
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5 + ["Question: Answer: The following are"], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>",
                                                eos_token="<|endoftext|>")
    config = transformers.LlamaConfig(
        vocab_size=fast.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True)
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.7 if "embed" in name else 0.4)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return model, fast


def include(folder, name, family, yaml, path, shots):
    """A task of lm-eval's with local files in place of the hub's."""
    root = pathlib.Path(lm_eval.__file__).parent / "tasks"
    lines = [f"include: {root / family / yaml}", f"task: {name}", "dataset_path: json",
             "dataset_name: null", "dataset_kwargs:", "  data_files:"]
    lines += [f"    {split}: {path}" for split in ("train", "validation", "test", "dev")]
    lines += ["fewshot_config:", "  sampler: first_n", f"num_fewshot: {shots}"]
    lines += ["tag: null"]
    if family == "mmlu/default":
        lines += ['description: "The following are multiple choice questions (with answers) about '
                  'marine biology.\\n\\n"', "fewshot_split: dev"]
    (pathlib.Path(folder) / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return name


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path("test/golden"))
    out = args.parse_args().out.resolve()
    texts = write_items(out, random.Random(1))
    model, tokenizer = make_model(out / "eval_model")
    lm = HFLM(pretrained=model.double(), tokenizer=tokenizer, batch_size=8, device="cpu")
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for shots in (0, 2):
            end = f"_{shots}shot"
            names.append(include(folder, "hellaswag" + end, "hellaswag", "hellaswag.yaml",
                                 out / "eval_hellaswag.jsonl", shots))
            names.append(include(folder, "arc" + end, "arc", "arc_easy.yaml", out / "eval_arc.jsonl", shots))
            names.append(include(folder, "mmlu" + end, "mmlu/default", "_default_template_yaml",
                                 out / "eval_mmlu.jsonl", shots))
        manager = TaskManager(include_path=folder, include_defaults=False)
        results = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0)
        for name in names:
            scores[name] = {k.split(",")[0]: v for k, v in results["results"][name].items()
                            if k in ("acc,none", "acc_norm,none")}
    rolling = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(texts)]
    total = sum(lm.loglikelihood_rolling(rolling))
    scores["bits_per_byte"] = -total / math.log(2) / sum(len(t.encode()) for t in texts)
    (out / "eval_scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
