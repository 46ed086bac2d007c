#!/usr/bin/env python3
"""lm-evaluation-harness through ./serve equals ./chat eval.

    python3 -m venv venv && venv/bin/pip install 'lm-eval[api]==0.4.13' transformers
    venv/bin/python dev/interop/lm_eval_check.py [MODEL] [--serve ./serve] [--chat ./chat]

lm-eval's local-completions sends the ids of a question and an answer to /v1/completions, with echo
and logprobs, and adds up the log-probabilities of the answer. ./chat eval asks the same questions
of the same model itself. Each log-probability must be the same to 1e-4, and the accuracies equal.
The questions are those of test/golden (HellaSwag's, ARC's and MMLU's formats); MODEL is a model
directory with a tokenizer that transformers can read, by default test/golden/eval_model. The ids
come from that tokenizer, or with --tokenizer remote from ./serve. Nothing is downloaded.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

from serve_process import serving

GOLDEN = pathlib.Path("test/golden").resolve()
TASKS = {"hellaswag": "hellaswag/hellaswag.yaml", "arc_easy": "arc/arc_easy.yaml",
         "mmlu": "mmlu/default/_default_template_yaml"}


def file_of(task):
    return GOLDEN / f"eval_{task.removesuffix('_easy')}.jsonl"


def write_task(folder, task):
    """lm-eval's own task, with a local file in place of the hub's."""
    root = pathlib.Path(lm_eval.__file__).parent / "tasks"
    lines = [f"include: {root / TASKS[task]}", f"task: {task}", "dataset_path: json",
             "dataset_name: null", "tag: null", "num_fewshot: 0", "dataset_kwargs:",
             "  data_files:"]
    lines += [f"    {split}: {file_of(task)}" for split in ("train", "validation", "test", "dev")]
    if task == "mmlu":
        lines += ['description: "The following are multiple choice questions (with answers) about '
                  'marine biology.\\n\\n"', "fewshot_split: dev"]
    (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n")


def chat_eval(o, folder):
    """The log-probabilities of each choice of each question, by task, and the accuracies."""
    subprocess.run([o.chat, "eval", o.model, "--base", "--no-start",
                    "--tasks", ",".join(f"{t}={file_of(t)}" for t in TASKS),
                    "--json", folder / "results.json", "-o", folder / "answers.jsonl"],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = {t: [] for t in TASKS}
    for line in (folder / "answers.jsonl").open():
        answer = json.loads(line)
        answers[answer["task"]].append(answer["logp"])
    return answers, json.loads((folder / "results.json").read_text())


def harness(o, folder):
    with serving([o.serve, f"model={o.model}"], o.port, stderr=subprocess.DEVNULL):
        return lm_eval.simple_evaluate(
            model="local-completions", tasks=list(TASKS), batch_size=o.batch, bootstrap_iters=0,
            model_args=dict(base_url=f"http://127.0.0.1:{o.port}/v1/completions", model="model",
                            tokenizer=o.model, tokenizer_backend=o.tokenizer, num_concurrent=4),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default=str(GOLDEN / "eval_model"))
    parser.add_argument("--serve", default="./serve")
    parser.add_argument("--chat", default="./chat")
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--batch", type=int, default=8, help="prompts of a request")
    parser.add_argument("--tokenizer", default="huggingface", choices=["huggingface", "remote"])
    o = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for task in TASKS:
            write_task(folder, task)
        ours, accuracy = chat_eval(o, folder)
        theirs = harness(o, folder)
    for task in TASKS:
        samples = sorted(theirs["samples"][task], key=lambda s: s["doc_id"])
        differences = []
        for logp, sample in zip(ours[task], samples, strict=True):
            for a, (response,) in zip(logp, sample["resps"], strict=True):
                differences.append(abs(a - float(response[0])))
        worst = max(differences)
        equal = worst <= 1e-4
        for metric in ("acc", "acc_norm"):
            b = theirs["results"][task].get(f"{metric},none")
            if b is None:
                continue
            key = f"{task}_acc" if metric == "acc" and f"{task}_acc" in accuracy else task
            a = accuracy[key]["value"]
            print(f"{task:<10} {metric:<9} ./chat eval {a:.4f}, lm-eval {b:.4f}")
            equal = equal and abs(a - b) < 1e-9
        print(f"{task:<10} {len(differences)} log-probabilities, largest difference {worst:.2e}"
              f"{'' if equal else '  FAILED'}")
        failures += not equal
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
