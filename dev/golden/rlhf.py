"""Goldens of the objectives: one step each of PPO, GRPO, DPO and a reward model, by autograd.

    python dev/golden/rlhf.py [--out test/golden]

One rlhf_NAME.safetensors a step, read by test/test_rlhf.cpp. Losses are written here as the papers
and TRL write them, on padded (sequences, tokens) tensors with masks and torch's min, clamp and
whitening, and differentiated by autograd: none of rlhf.cpp's derivatives is used. Weights come from
the formula of common.py. Whatever a step is given beside its tokens (old and reference
log-probabilities, old values) is the model's own plus noise, so that ratios are not 1 and clips
hold, and is stored:

    tokens, targets, doc_starts   packed positions; a target of -1 is masked
    old_logp, ref_logp, old_value (N), at positions with a target
    loss..., dlogp...             by their objective
    gradient.NAME                 d loss / d NAME;  critic.gradient.NAME  of PPO's critic

The metadata entry "golden" has the config and the settings of the step. The script ends by printing
how far PyTorch's own float32 is from the stored figures. It stops where a ratio or a value lies so
near a clip that rounding could decide.
"""

import argparse
import json
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

sys.dont_write_bytecode = True
from common import config, ids, make_model, signed, table
from models import run

SHAPE = dict(V=53, T=40, L=2, C=16, NH=2, NKV=1, HS=8, F=24, tied=True)
POLICY, SCALAR = config("qwen3", **SHAPE), config("qwen3", head="scalar", **SHAPE)


class Rollouts:
    """Prompts and answers as packed positions; `inserted` answers' tokens (rollout, at) have no loss."""

    def __init__(self, name, prompts, answers, inserted=()):
        tokens, targets, self.starts = [], [], [0]
        for i, (p, n) in enumerate(zip(prompts, answers)):
            x = ids(f"{name}.{i}", p + n, SHAPE["V"])
            y = x[1:].copy()
            y[: p - 1] = -1
            for r, at in inserted:
                if r == i:
                    y[p - 1 + at] = -1
            tokens, targets = np.append(tokens, x[:-1]), np.append(targets, y)
            self.starts.append(len(tokens))
        self.tokens, self.targets = tokens.astype(np.int64), targets.astype(np.int64)
        self.live = torch.from_numpy(self.targets >= 0)
        self.B, self.N = len(answers), len(self.tokens)
        longest = max(answers)
        self.mask = torch.zeros(self.B, longest, dtype=torch.float64)
        for i, (p, n) in enumerate(zip(prompts, answers)):
            begin = self.starts[i] + p - 1
            self.mask[i, :n] = self.live[begin : begin + n]
        self.prompts, self.answers = prompts, answers

    def data(self):
        return dict(tokens=self.tokens, targets=self.targets, doc_starts=np.array(self.starts))

    def pad(self, packed):  # (N) to (B, longest answer), zero elsewhere
        rows = []
        for i, (p, n) in enumerate(zip(self.prompts, self.answers)):
            begin = self.starts[i] + p - 1
            rows.append(F.pad(packed[begin : begin + n], (0, self.mask.shape[1] - n)))
        return torch.stack(rows) * self.mask.to(packed.dtype)

    def last(self, packed):  # (B), at each document's last position
        return packed[torch.tensor(self.starts[1:]) - 1]


def rounded(x):  # to what is stored
    return x.detach().float().to(x.dtype)


def beside(x, name, size, live=None):
    """x and noise, as stored: the log-probabilities or values of another model."""
    y = rounded(x + size * torch.from_numpy(signed(name, len(x))))
    return y if live is None else y * live


def away_from(x, bounds, name):
    for b in bounds:
        assert (x - b).abs().min() > 1e-4, f"{name}: rounding decides at {b}: choose other noise"


def gradients(model, c, prefix=""):
    return {f"{prefix}gradient.{row.name}": row.gradient().clone() for row in table(model, c)}


def surrogate(ratio, advantage, low, high):
    away_from(ratio, (1 - low, 1 + high), "ratio")
    held = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    assert held.any() and not held.all(), "nothing is clipped, or all: choose other noise"
    return torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - low, 1 + high))


def ppo(dtype):
    s = dict(temperature=0.7, beta=0.15, gamma=0.98, lam=0.95, clip=0.2, value_clip=0.2, entropy=0.02)
    r = Rollouts("ppo", [3, 5, 2], [9, 4, 12])
    scores = torch.tensor([1.25, -0.5, 0.75], dtype=dtype)
    policy, critic = make_model(POLICY, dtype), make_model(SCALAR, dtype)
    _, logp, entropy = run(policy, POLICY, r.tokens, r.targets, r.starts, s["temperature"])
    value = run(critic, SCALAR, r.tokens, r.targets, r.starts, 1.0)
    old, ref = (beside(logp, n, size, r.live) for n, size in (("ppo.old", 0.4), ("ppo.ref", 0.6)))
    old_value = beside(value, "ppo.value", 0.5) * r.live
    # A_t = sum over k of (gamma lambda)^k delta_{t + k}, each term of it
    v, reward = r.pad(old_value), -s["beta"] * (r.pad(old) - r.pad(ref))
    advantage = torch.zeros_like(v)
    for i, n in enumerate(r.answers):
        reward[i, n - 1] += scores[i]
        after = [v[i, t + 1] if t + 1 < n else 0.0 for t in range(n)]
        delta = [reward[i, t] + s["gamma"] * after[t] - v[i, t] for t in range(n)]
        for t in range(n):
            advantage[i, t] = sum((s["gamma"] * s["lam"]) ** (k - t) * delta[k] for k in range(t, n))
    returns = (advantage + v) * r.mask.to(dtype)
    m = r.mask.bool()
    flat = advantage[m]
    flat = (flat - flat.mean()) / torch.sqrt(flat.var(unbiased=False) + 1e-8)
    ratio = torch.exp(r.pad(logp)[m] - r.pad(old)[m])
    loss = surrogate(ratio, flat, s["clip"], s["clip"]).mean() - s["entropy"] * r.pad(entropy)[m].mean()
    loss.backward()
    new, before, target = r.pad(value)[m], v[m], returns[m]
    away_from((new - before).abs(), (s["value_clip"],), "value")
    held = before + torch.clamp(new - before, -s["value_clip"], s["value_clip"])
    value_loss = 0.5 * torch.max((new - target) ** 2, (held - target) ** 2).mean()
    value_loss.backward()
    out = dict(r.data(), scores=scores, old_logp=old, ref_logp=ref, old_value=old_value,
               advantages=flat, returns=target, loss=loss.reshape(1), value_loss=value_loss.reshape(1),
               **gradients(policy, POLICY), **gradients(critic, SCALAR, "critic."))
    return POLICY, s, out


def grpo(dtype):
    s = dict(temperature=1.0, groups=3, beta=0.04, low=0.2, high=0.28, max_length=16)
    # one group has no variance; a tool wrote two of the tokens
    rewards = torch.tensor([[1, 0, 0.5], [1, 1, 1], [0, 0, 1]], dtype=dtype)
    r = Rollouts("grpo", [4, 4, 4, 2, 2, 2, 3, 3, 3], [5, 9, 3, 4, 6, 2, 7, 8, 12], [(1, 3), (1, 4)])
    policy = make_model(POLICY, dtype)
    _, logp, _ = run(policy, POLICY, r.tokens, r.targets, r.starts, s["temperature"])
    logp.retain_grad()
    drift = np.repeat(signed("grpo.drift", r.B), np.diff(r.starts))  # of whole rollouts
    old = beside(logp + 0.8 * torch.from_numpy(drift), "grpo.old", 0.3, r.live)
    ref = beside(logp, "grpo.ref", 0.5, r.live)
    l, l_old, l_ref, mask = r.pad(logp), r.pad(old), r.pad(ref), r.mask.to(dtype)
    lengths = mask.sum(-1)
    centred = rewards - rewards.mean(-1, keepdim=True)
    scaled = centred / (rewards.std(-1, keepdim=True) + 1e-4)
    k3 = torch.exp(l_ref - l) - (l_ref - l) - 1
    # RLOO: the KL is in the reward, one number an answer; the baseline is the mean of the others
    priced = rewards - s["beta"] * ((l_old - l_ref) * mask).sum(-1).reshape(3, 3)
    others = (priced.sum(-1, keepdim=True) - priced) / 2

    def tokens(advantage, low=0.2, high=0.2):
        return surrogate(torch.exp(l - l_old), advantage.reshape(-1, 1), low, high) * mask

    def sequences(advantage):
        ratio = torch.exp(((l - l_old) * mask).sum(-1) / lengths)
        return surrogate(ratio, advantage.reshape(-1), 0.2, 0.2)

    losses = dict(
        grpo=((tokens(scaled) + s["beta"] * k3 * mask).sum(-1) / lengths).mean(),
        dr_grpo=tokens(centred).sum() / (r.B * s["max_length"]),
        dapo=tokens(scaled, s["low"], s["high"]).sum() / mask.sum(),
        rloo=tokens(priced - others).sum(-1).mean(),
        cake=tokens(centred).sum() / mask.sum(),
        gspo=sequences(scaled).mean())
    out = dict(r.data(), rewards=rewards.reshape(-1), old_logp=old, ref_logp=ref)
    for name, loss in losses.items():
        policy.zero_grad()
        logp.grad = None
        loss.backward(retain_graph=True)
        out["loss." + name], out["dlogp." + name] = loss.reshape(1), logp.grad.clone()
        if name in ("grpo", "gspo"):
            out.update(gradients(policy, POLICY, name + "."))
    return POLICY, s, out


def dpo(dtype):
    s = dict(temperature=1.0, beta=0.1, smoothing=0.1, lam=0.5, baseline=0.125)
    r = Rollouts("dpo", [4, 4, 2, 2, 5, 5], [6, 9, 11, 3, 5, 5])  # chosen, rejected, chosen, ...
    policy = make_model(POLICY, dtype)
    _, logp, _ = run(policy, POLICY, r.tokens, r.targets, r.starts, s["temperature"])
    logp.retain_grad()
    ref = beside(logp, "dpo.ref", 0.6, r.live)
    sums, ref_sums, counts = r.pad(logp).sum(-1), r.pad(ref).sum(-1), r.mask.to(dtype).sum(-1)
    shift = (sums - ref_sums).reshape(-1, 2)
    D = shift[:, 0] - shift[:, 1]
    means, ref_means = (sums / counts).reshape(-1, 2), (ref_sums / counts).reshape(-1, 2)
    D_means = (means - ref_means)[:, 0] - (means - ref_means)[:, 1]
    p = torch.exp(means)
    odds = torch.log(p[:, 0] / (1 - p[:, 0])) - torch.log(p[:, 1] / (1 - p[:, 1]))
    good = torch.sigmoid(s["beta"] * (shift[:, 0] - s["baseline"]))
    bad = torch.sigmoid(s["beta"] * (s["baseline"] - shift[:, 1]))
    losses = dict(
        dpo=F.binary_cross_entropy_with_logits(s["beta"] * D, torch.full_like(D, 1 - s["smoothing"])),
        ipo=((D_means - 1 / (2 * s["beta"])) ** 2).mean(),
        orpo=(-means[:, 0] - s["lam"] * F.logsigmoid(odds)).mean(),
        kto=torch.cat((1 - good, 1 - bad)).mean())
    out = dict(r.data(), ref_logp=ref)
    for name, loss in losses.items():
        policy.zero_grad()
        logp.grad = None
        loss.backward(retain_graph=True)
        out["loss." + name], out["dlogp." + name] = loss.reshape(1), logp.grad.clone()
        if name == "dpo":
            out.update(gradients(policy, POLICY))
    return POLICY, s, out


def reward(dtype):
    s = dict(temperature=1.0, margin=0.1, centring=0.01, rankings=[[1, 2, 3], [2, 1, 1, 3]], labels=[1, 0])
    r = Rollouts("reward", [2] * 9, [5, 9, 4, 12, 3, 7, 6, 8, 2])
    model = make_model(SCALAR, dtype)
    score = r.last(run(model, SCALAR, r.tokens, r.targets, r.starts, 1.0))
    rows, loss = score.split([3, 4, 2]), 0
    for row, ranking in zip(rows, s["rankings"]):
        k, ranks = len(ranking), torch.tensor(ranking)
        i, j = torch.triu_indices(k, k, 1)
        i, j = torch.where(ranks[i] < ranks[j], i, j), torch.where(ranks[i] < ranks[j], j, i)
        pairs = ranks[i] != ranks[j]
        i, j = i[pairs], j[pairs]
        centre = s["centring"] * (row[i] + row[j]).square().mean()
        loss = loss + (F.softplus(row[j] - row[i] + s["margin"]).mean() + centre) / len(s["rankings"])
    labels = F.binary_cross_entropy_with_logits(rows[2], torch.tensor(s["labels"], dtype=dtype))
    (loss + labels).backward()
    out = dict(r.data(), score=score, loss=loss.reshape(1), **{"loss.labels": labels.reshape(1)},
               **gradients(model, SCALAR))
    return SCALAR, s, out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="test/golden")
    arguments = parser.parse_args()
    for step in (ppo, grpo, dpo, reward):
        c, settings, truth = step(torch.float64)
        single = step(torch.float32)[2]
        # noise is added to a float32 model's own log-probabilities there: an error of its own
        errors, kept = {}, {}
        for k, v in truth.items():
            v, w = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (v, single[k]))
            kept[k] = np.ascontiguousarray(v, np.float32)
            group = "gradient" if "gradient." in k else k.split(".")[0]
            error = np.linalg.norm(w - v) / max(np.linalg.norm(v), 1e-30)
            errors[group] = max(errors.get(group, (0, "")), (error, k))
        path = os.path.join(arguments.out, f"rlhf_{step.__name__}.safetensors")
        settings = dict(settings, config=c)
        save_file(kept, path, dict(golden=json.dumps(settings)))
        os.chmod(path, 0o644)
        print(f"{path}: {os.path.getsize(path)} bytes",
              {k: round(v.item(), 6) for k, v in truth.items() if "loss" in k})
        for group, (error, k) in errors.items():
            if error > 0:
                print(f"  float32 {group}: {error:.1e} ({k})")


if __name__ == "__main__":
    main()
