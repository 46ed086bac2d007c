"""What PyTorch does on this machine's CPU with the work that `make bench` gives to cake.

    python dev/bench/peer_torch.py [--only TEXT] [--seconds S] [--threads N] [--list]

Prints a JSON line for each figure, {"name", "value", "unit"}:

    gemm.{forward,dx,dw}.NxOUTxIN   GFLOP/s of torch.mm (MKL) on the products of a linear layer
    step.MODEL.{eager,compile}      tokens/s of a training step: forward, loss, backward, optimizer

All in fp32. Each figure is the best of several repetitions within S seconds, after a warm-up. The
models are written plainly over F.scaled_dot_product_attention, as a practitioner would.
"""

import argparse
import functools
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------
# GPT-2: learned positions, LayerNorm, GELU (tanh form), biases, tied head


class Gpt2Block(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.o = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, NH, T, HS) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, vocabulary, context, layers, channels, heads):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, channels)
        self.wpe = nn.Embedding(context, channels)
        self.blocks = nn.ModuleList(Gpt2Block(channels, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, vocabulary, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---------------------------------------------------------------------------------------------
# Qwen3's shape: RoPE, RMSNorm also over each head of q and k, SwiGLU, untied head


class QwenBlock(nn.Module):
    def __init__(self, channels, heads, head_size, width):
        super().__init__()
        self.heads, self.head_size = heads, head_size
        inner = heads * head_size
        self.norm1, self.norm2 = nn.RMSNorm(channels, 1e-6), nn.RMSNorm(channels, 1e-6)
        self.q_norm, self.k_norm = nn.RMSNorm(head_size, 1e-6), nn.RMSNorm(head_size, 1e-6)
        linear = functools.partial(nn.Linear, bias=False)
        self.q, self.k, self.v = (linear(channels, inner) for _ in range(3))
        self.o = linear(inner, channels)
        self.gate, self.up = linear(channels, width), linear(channels, width)
        self.down = linear(width, channels)

    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, x, cos, sin):  # (B, T, C), (T, HS/2), (T, HS/2)
        B, T, _ = x.shape
        y = self.norm1(x)
        q, k, v = (w(y).view(B, T, self.heads, self.head_size).transpose(1, 2)
                   for w in (self.q, self.k, self.v))
        q = self.rotate(self.q_norm(q), cos, sin)
        k = self.rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Qwen(nn.Module):
    def __init__(self, vocabulary, context, layers, channels, heads, head_size, width):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, channels)
        self.blocks = nn.ModuleList(
            QwenBlock(channels, heads, head_size, width) for _ in range(layers))
        self.norm = nn.RMSNorm(channels, 1e-6)
        self.head = nn.Linear(channels, vocabulary, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
        angles = torch.arange(context)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids):
        x = self.wte(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


# ---------------------------------------------------------------------------------------------
# Optimizers


class Muon(torch.optim.Optimizer):
    """Matrices of one shape go through the five iterations together, as one batched product."""

    def __init__(self, parameters, lr=0.02, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (out, inputs), ps in shapes.items():
                state = self.state[ps[0]]
                g = torch.stack([p.grad for p in ps])
                m = state.setdefault("momentum", torch.zeros_like(g))
                m.lerp_(g, 1 - group["momentum"])
                x = g.lerp_(m, group["momentum"])
                if out > inputs:
                    x = x.mT
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
                    x = torch.baddbmm(x, b, x, beta=3.4445)
                if out > inputs:
                    x = x.mT
                scale = -group["lr"] * math.sqrt(max(1, out / inputs))
                torch._foreach_add_(ps, list(x.unbind()), alpha=scale)


def adamw(parameters):
    parameters = list(parameters)
    return torch.optim.AdamW(
        [dict(params=[p for p in parameters if p.ndim == 2], weight_decay=0.1),
         dict(params=[p for p in parameters if p.ndim != 2], weight_decay=0.0)],
        lr=1e-4, betas=(0.9, 0.95), fused=True)  # the fastest of its forms on a CPU


def muon_and_adamw(model):
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    owned = set(matrices)
    return [Muon(matrices, lr=1e-3), adamw(p for p in model.parameters() if p not in owned)]


# ---------------------------------------------------------------------------------------------
# Measurements

LINEARS = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768)]  # GPT-2 124M (OUT, IN)

MODELS = {  # (make, vocabulary, B, T, optimizers)
    "gpt2_124m": (lambda: Gpt2(50257, 1024, 12, 768, 12), 50257, 4, 64, "adamw"),
    "6x384_v50257": (lambda: Gpt2(50257, 256, 6, 384, 6), 50257, 8, 256, "adamw"),
    "6x384_v1024": (lambda: Gpt2(1024, 256, 6, 384, 6), 1024, 8, 256, "adamw"),
    "demo_muon": (lambda: Qwen(1536, 256, 4, 128, 4, 32, 384), 1536, 8, 256, "muon"),
    "demo_adamw": (lambda: Qwen(1536, 256, 4, 128, 4, 32, 384), 1536, 8, 256, "adamw"),
}


def best_time(work, seconds, warmup=2):
    """Seconds of one call: the best mean of windows that are long enough to time."""
    for _ in range(warmup):
        work()
    start = time.perf_counter()
    work()
    once = max(1e-9, time.perf_counter() - start)
    calls = max(1, int(min(0.25, seconds / 8) / once))
    best, end = once, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def gemm(kind, n, out, inputs, seconds):
    x, w, dy = torch.randn(n, inputs), torch.randn(out, inputs), torch.randn(n, out)
    work = {
        "forward": functools.partial(torch.mm, x, w.T, out=torch.empty(n, out)),
        "dx": functools.partial(torch.mm, dy, w, out=torch.empty(n, inputs)),
        "dw": functools.partial(torch.mm, dy.T, x, out=torch.empty(out, inputs)),
    }[kind]
    return 2e-9 * n * out * inputs / best_time(work, seconds), "GFLOP/s"


def step(name, mode, seconds):
    torch.manual_seed(1)
    make, vocabulary, B, T, optimizer = MODELS[name]
    model = make()
    ids, targets = torch.randint(vocabulary, (2, B, T))
    run = torch.compile(model) if mode == "compile" else model
    parameters = list(model.parameters())
    optimizers = muon_and_adamw(model) if optimizer == "muon" else [adamw(model.parameters())]

    def train_step():
        loss = F.cross_entropy(run(ids).view(-1, vocabulary), targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # as cake's step and nanoGPT's do
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)

    return B * T / best_time(train_step, seconds, warmup=3), "tokens/s"


def figures():
    for n in (256, 1024):
        for out, inputs in LINEARS:
            for kind in ("forward", "dx", "dw"):
                yield (f"gemm.{kind}.{n}x{out}x{inputs}",
                       functools.partial(gemm, kind, n, out, inputs))
    for name in MODELS:
        for mode in ("eager", "compile"):
            yield f"step.{name}.{mode}", functools.partial(step, name, mode)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="measure names that contain this text")
    parser.add_argument("--seconds", type=float, default=6,
                        help="of each step figure; a GEMM gets a sixth")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for name, measure in figures():
        if a.only not in name:
            continue
        if a.list:
            print(name)
            continue
        value, unit = measure(a.seconds / 6 if name.startswith("gemm") else a.seconds)
        print(json.dumps({"name": name, "value": round(value, 1), "unit": unit}), flush=True)


if __name__ == "__main__":
    main()
