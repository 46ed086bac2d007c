"""Fine-tuning by PyTorch beside ./sft: same model, examples, order and settings, in fp32.

    python dev/bench/sft_torch.py convert ../shared/data/gsm8k/train.jsonl train.jsonl
    python dev/bench/sft_torch.py convert ../shared/data/gsm8k/test.jsonl test.jsonl
    ./sft --model RUN --data train.jsonl --val test.jsonl -o OUT --context 512 --batch-tokens 2048 \\
        --steps 60 --lr 1e-3 --warmup 6
    python dev/bench/sft_torch.py train RUN/model train.jsonl test.jsonl --context 512 \\
        --batch-tokens 2048 --steps 60 --lr 1e-3 --warmup 6 --beside OUT

`convert` makes conversations of questions and answers. `train` prints the loss of each step and the
held-out loss as ./sft's metrics.jsonl has them, and with --beside the largest differences from
them. The model is transformers', the mask the template's {% generation %}, the optimizer torch's
AdamW; the order of examples, the bins and the schedule are sft.cpp's, written again here. Examples
are padded, not packed: what packing computes is compared, too.
"""

import argparse
import bisect
import json
import pathlib

M64 = 2**64 - 1


def mix64(*words):
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & M64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
        return x ^ (x >> 31)

    h = mix(words[0])
    for w in words[1:]:
        h = mix(h ^ w)
    return h


def hash64(text):
    h = 0xCBF29CE484222325
    for c in text.encode():
        h = (h ^ c) * 0x100000001B3 & M64
    return mix64(h)


def shuffle(items, seed, counter):
    for i in range(len(items), 1, -1):
        j = mix64(seed, counter) * i >> 64
        items[i - 1], items[j] = items[j], items[i - 1]
        counter += 1
    return counter


def epoch_bins(lengths, capacity, seed, epoch):
    order = list(range(len(lengths)))
    stream = mix64(seed, hash64("order"), epoch)
    counter = shuffle(order, stream, 0)
    order.sort(key=lambda i: -lengths[i])
    bins, room = [], []  # room: sorted (positions left, bin)
    for i in order:
        at = bisect.bisect_left(room, (lengths[i], 0))
        left, b = room.pop(at) if at < len(room) else (capacity, len(bins))
        if b == len(bins):
            bins.append([])
        bins[b].append(i)
        if left > lengths[i]:
            bisect.insort(room, (left - lengths[i], b))
    shuffle(bins, stream, counter)
    return bins


def read_examples(path, tokenizer, context):
    examples = []
    for line in open(path):
        out = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = out["input_ids"], out["assistant_masks"]
        last = max(i for i, m in enumerate(mask) if m)
        if last <= context:
            examples.append((ids[: last + 1], mask[: last + 1]))
    return examples


def train(args):
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.chat_template:  # a base model from before the template: the fine-tuned one's
        tokenizer = transformers.AutoTokenizer.from_pretrained(pathlib.Path(args.beside) / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    examples = read_examples(args.data, tokenizer, args.context)
    held_out = read_examples(args.val, tokenizer, args.context)

    def nats(chosen):  # the summed loss of trained tokens, and their number
        longest = max(len(ids) for ids, _ in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        labels = torch.full((len(chosen), longest), -100)
        mask = torch.zeros(len(chosen), longest, dtype=torch.long)
        for row, (example, trained) in enumerate(chosen):
            n = len(example)
            ids[row, :n], mask[row, :n] = torch.tensor(example), 1
            labels[row, :n] = torch.where(torch.tensor(trained) > 0, ids[row, :n], -100)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
        return loss, int((labels[:, 1:] >= 0).sum())

    floor = min(args.eval_tokens, max(4096, 2 * args.context))
    positions = min(max(args.batch_tokens * args.steps // 50, floor), args.eval_tokens)
    some = []
    for e in held_out:
        if positions < len(e[0]) - 1:
            break
        positions -= len(e[0]) - 1
        some.append(e)

    def evaluate():
        total = count = 0
        with torch.no_grad():
            for i in range(0, len(some), 8):
                loss, n = nats(some[i : i + 8])
                total, count = total + loss.item(), count + n
        return total / count

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    bins, epoch, results = [], 0, []
    report = lambda **r: (results.append(r), print(json.dumps(r), flush=True))
    report(step=0, val_loss=evaluate())
    for step in range(1, args.steps + 1):
        chosen = []
        for _ in range(args.batch_tokens // args.context):
            if not bins:
                bins = epoch_bins([len(ids) - 1 for ids, _ in examples], args.context, args.seed, epoch)
                epoch += 1
            chosen += [examples[i] for i in bins.pop(0)]
        trained = sum(sum(mask[1:]) for _, mask in chosen)
        rising, falling = step / args.warmup, (args.steps - step) / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (rising if step <= args.warmup else falling)
        loss_sum = 0.0
        for i in range(0, len(chosen), 8):
            loss, _ = nats(chosen[i : i + 8])
            (loss / trained).backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step=step, loss=loss_sum / trained, grad_norm=norm.item())
        if step % max(1, args.steps // 10) == 0:
            report(step=step, val_loss=evaluate())

    if args.beside:
        ours = [json.loads(line) for line in open(pathlib.Path(args.beside) / "metrics.jsonl")]
        for key in ["loss", "val_loss", "grad_norm"]:
            mine = {r["step"]: r[key] for r in results if key in r}
            theirs = {r["step"]: r[key] for r in ours if key in r and not r.get("final")}
            assert mine.keys() == theirs.keys(), f"{key}: other steps"
            worst = max(abs(mine[s] - theirs[s]) for s in mine)
            print(f"{key}: largest difference {worst:.2e}, last {mine[max(mine)]:.4f} (PyTorch) {theirs[max(mine)]:.4f} (./sft)")


def convert(args):
    with open(args.out, "w") as out:
        for line in open(args.input):
            r = json.loads(line)
            messages = [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    c = commands.add_parser("convert")
    c.add_argument("input")
    c.add_argument("out")
    c.set_defaults(run=convert)
    t = commands.add_parser("train")
    for name in ["model", "data", "val"]:
        t.add_argument(name)
    for name, default in dict(context=512, batch_tokens=2048, steps=60, warmup=6, eval_tokens=1 << 18, seed=1, threads=2).items():
        t.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    t.add_argument("--lr", type=float, default=1e-3)
    t.add_argument("--beside", default="", help="a run of ./sft with the same settings")
    t.set_defaults(run=train)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
