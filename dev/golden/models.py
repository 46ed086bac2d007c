"""Goldens of whole models: what PyTorch and transformers compute in double precision.

    python dev/golden/models.py [--out test/golden] [--only NAME]

One NAME.safetensors a model, read by test/test_goldens.cpp. Its metadata entry "golden" is
a JSON object: config, in the letters of cake/gpt.h, temperature, and adamw, the settings of the
steps. The tensors are

    tokens, targets, doc_starts        the packed batch; a target of -1 is masked
    logits_at, logits                  positions, and their logits (., V), before the temperature
    logp, entropy                      (N), 0 where the target is masked
    loss                               mean of -logp over the targets
    dlogp, dentropy, dvalue            the weights of the objective that is differentiated
    value                              (N), scalar head
    gradient.NAME                      d sum(dlogp logp + dentropy H + dvalue value) / d NAME
    adamw.loss, adamw.norm             before each of three steps and after them; gradient norms
    adamw.weight.NAME                  weights after the three steps (one model)

Every document is computed alone: that is what packing has to equal. The script ends by printing how
far PyTorch's own float32 is from these figures, the yardstick for the tolerances of the test.
(RMSNorm and the RoPE angles of transformers are computed in float32 even in a float64 model, so the
truth itself is good to about 1e-7.)
"""

import argparse
import json
import os
import sys

import numpy as np
import torch
from safetensors.numpy import save_file

sys.dont_write_bytecode = True
from common import config, ids, make_model, signed, table

MODELS = {
    # sizes are odd on purpose: no vocabulary, width or length is a multiple of a vector or a tile
    "gpt2": dict(
        config=config("gpt2", V=131, T=40, L=2, C=24, NH=3, tied=True, norm_eps=1e-5),
        documents=[7, 1, 13, 5, 40]),
    # n_inner given; a temperature; weights after the steps, with an eps beside which the size of
    # the gradient counts: without it Adam divides a wrong clipping away
    "gpt2_untied": dict(
        config=config("gpt2", V=61, T=24, L=1, C=20, NH=2, F=50, norm_eps=1e-5),
        documents=[3, 24, 1, 9], temperature=1.7, keep_weights=True,
        eps=1e-3),
    "llama": dict(  # NH HS = 48 differs from C = 28
        config=config("llama", V=109, T=64, L=2, C=28, NH=4, NKV=2, HS=12, F=36, norm_eps=1e-5),
        documents=[7, 1, 13, 5, 29]),
    "llama3": dict(  # scaled RoPE: wavelengths 6, 20, 63, 199 lie on both sides of 8 and of 32
        config=config("llama", V=83, T=128, L=2, C=20, NH=4, NKV=4, HS=8, F=36, tied=True,
                      rope_theta=100.0, rope_factor=4.0, rope_original_T=32),
        documents=[71, 2, 17]),
    "qwen3": dict(
        config=config("qwen3", V=117, T=64, L=2, C=24, NH=4, NKV=2, HS=16, F=44,
                      rope_theta=1e6),
        documents=[11, 1, 33, 2, 6]),
    "qwen3_long": dict(  # longer than any attention tile; the entropy's gradient, a temperature
        config=config("qwen3", V=97, T=160, L=2, C=24, NH=3, NKV=1, HS=8, F=40, tied=True),
        documents=[141, 3, 66, 1], temperature=0.7, entropy_weights=True),
    "qwen2": dict(  # NH HS = 18 differs from C = 12
        config=config("qwen2", V=37, T=32, L=2, C=12, NH=3, NKV=1, HS=6, F=20, tied=True,
                      rope_theta=1e6),
        documents=[9, 1, 20]),
    "mistral": dict(  # without a window; linear RoPE
        config=config("mistral", V=31, T=48, L=1, C=12, NH=2, NKV=1, HS=6, F=16,
                      rope_factor=2.5, rope_linear=True),
        documents=[5, 31]),
    "qwen3_scalar": dict(
        config=config("qwen3", head="scalar", V=53, T=40, L=2, C=20, NH=2, NKV=1, HS=12, F=36,
                      tied=True),
        documents=[9, 1, 21, 4]),
    "gpt2_scalar": dict(
        config=config("gpt2", head="scalar", V=41, T=32, L=1, C=16, NH=2, tied=True, norm_eps=1e-5),
        documents=[5, 1, 17]),
}

ADAMW_LR = dict(embedding=3e-3, position=2e-3, matrix=1e-3, head=4e-3, vector=5e-4)
ADAMW_DECAY, ADAMW_MAX_NORM = 0.1, 0.5  # every step is clipped


def make_batch(name, c, documents):
    n = sum(documents)
    tokens = ids(name + ".tokens", n, c["V"])
    targets = ids(name + ".targets", n, c["V"])
    targets[signed(name + ".masked", n) > 0.6] = -1  # a fifth
    return tokens, targets, np.cumsum([0] + documents)


def run(model, c, tokens, targets, starts, temperature):
    """(logits, logp, entropy) or values of all positions, each document alone."""
    backbone = model.transformer if c["family"] == "gpt2" else model.model
    outputs = []
    for a, b in zip(starts[:-1], starts[1:]):
        # positions as they are counted in a document; use_cache off keeps every step in the graph
        hidden = backbone(torch.from_numpy(tokens[a:b])[None], use_cache=False).last_hidden_state[0]
        head = model.score if c["head"] == "scalar" else model.lm_head
        outputs.append(head(hidden))
    output = torch.cat(outputs)
    if c["head"] == "scalar":
        return output[:, 0]
    scored = torch.log_softmax(output / temperature, -1)
    target = torch.from_numpy(targets)
    live = (target >= 0).to(output.dtype)
    logp = scored.gather(1, target.clamp(min=0)[:, None])[:, 0] * live
    entropy = -(scored.exp() * scored).sum(-1) * live
    return output, logp, entropy


def adamw(model, c, batch, temperature, eps):
    """Three steps on the mean loss; the losses before each and after, and the gradient norms."""
    groups = {}
    for row in table(model, c):
        groups.setdefault((row.kind, row.decay), {})[row.parameter] = None
    optimizer = torch.optim.AdamW(
        [dict(params=list(p), lr=ADAMW_LR[kind], weight_decay=ADAMW_DECAY if decay else 0.0)
         for (kind, decay), p in groups.items()], betas=(0.9, 0.95), eps=eps)
    losses, norms = [], []
    count = (batch[1] >= 0).sum()
    for step in range(4):
        loss = -run(model, c, *batch, temperature)[1].sum() / count
        losses.append(loss.item())
        if step < 3:
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW_MAX_NORM).item())
            optimizer.step()
    return np.array(losses), np.array(norms)


def compute(name, spec, dtype):
    c, temperature = spec["config"], spec.get("temperature", 1.0)
    model = make_model(c, dtype)
    batch = tokens, targets, starts = make_batch(name, c, spec["documents"])
    n = len(tokens)
    out = {"tokens": tokens, "doc_starts": starts}
    if c["head"] == "scalar":
        value = run(model, c, *batch, temperature)
        out["dvalue"] = signed(name + ".dvalue", n)
        objective = (torch.from_numpy(out["dvalue"]) * value).sum()
        out["value"] = value
    else:
        out["targets"] = targets
        logits, logp, entropy = run(model, c, *batch, temperature)
        out["dlogp"] = signed(name + ".dlogp", n) / np.float32(n)
        objective = (torch.from_numpy(out["dlogp"]) * logp).sum()
        if spec.get("entropy_weights"):
            out["dentropy"] = signed(name + ".dentropy", n) / np.float32(n)
            objective = objective + (torch.from_numpy(out["dentropy"]) * entropy).sum()
        at = sorted({p for a, b in zip(starts, starts[1:]) for p in (a, (a + b) // 2, b - 1)})
        out.update(logits_at=np.array(at), logits=logits[at], logp=logp, entropy=entropy,
                   loss=-logp.sum().reshape(1) / (targets >= 0).sum())
    objective.backward()
    for row in table(model, c):
        out["gradient." + row.name] = row.gradient()
    if c["head"] == "lm":
        out["adamw.loss"], out["adamw.norm"] = adamw(
            model, c, batch, temperature, spec.get("eps", 1e-8))
        for row in table(model, c):
            out["adamw.weight." + row.name] = row.weight()
    return {k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in out.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="test/golden")
    parser.add_argument("--only", help="one model's name")
    arguments = parser.parse_args()
    total = 0
    for name, spec in MODELS.items():
        if arguments.only not in (None, name):
            continue
        truth = compute(name, spec, torch.float64)
        single = compute(name, spec, torch.float32)
        start = {r.name: r.formula() for r in table(make_model(spec["config"]), spec["config"])}
        errors = {}
        for k, v in truth.items():
            group = ".".join(k.split(".")[:2]) if k.startswith("adamw") else k.split(".")[0]
            if spec["config"]["family"] == "gpt2" and k.endswith("k.bias"):
                continue  # its gradient is zero in exact arithmetic
            v, w = v.astype(np.float64), single[k].astype(np.float64)
            norm = np.linalg.norm(v)
            if group == "adamw.weight":
                norm = np.linalg.norm(v - start[k.removeprefix("adamw.weight.")])
            error = np.linalg.norm(w - v) / max(norm, 1e-30)
            errors[group] = max(errors.get(group, (0, "")), (error, k))
        kept = {k: np.ascontiguousarray(v, np.float32) for k, v in truth.items()
                if spec.get("keep_weights") or not k.startswith("adamw.weight")}
        # one entry: safetensors writes several in any order
        metadata = dict(golden=json.dumps(dict(
            config=spec["config"], temperature=spec.get("temperature", 1.0),
            adamw=dict(lr=ADAMW_LR, decay=ADAMW_DECAY, max_norm=ADAMW_MAX_NORM,
                       eps=spec.get("eps", 1e-8)))))
        path = os.path.join(arguments.out, name + ".safetensors")
        save_file(kept, path, metadata)
        total += os.path.getsize(path)
        print(f"{path}: {os.path.getsize(path)} bytes", {k: truth[k] for k in truth if k in
              ("loss", "adamw.loss", "adamw.norm")})
        for group, (error, k) in errors.items():
            if error > 0:
                of = "change of adamw.weight" if group == "adamw.weight" else group
                print(f"  float32 {of}: {error:.1e} ({k})")
    print(f"{total} bytes")


if __name__ == "__main__":
    main()
