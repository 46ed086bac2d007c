"""What PyTorch does on this machine's GPU with the steps that dev/bench/bench_gpu.cpp times.

    python dev/bench/gpu_torch.py [--smoke] [--seconds S]

GPT-2 124M (B=64) and 1558M (B=32) at T=1024: torch.compile of the model and its loss, autocast to
bf16 over fp32 weights, flash attention, fused AdamW, gradients clipped to norm 1. The vocabulary is
padded to 50,304, which is faster. A figure's name ends with the batch, as in 1558M.B32: half of it,
and so on, where all of it does not fit 90 % of the memory. Prints a line for each figure: name,
value and unit, separated by tabs. --seconds 0: as few steps as there are, to fill the compiler's
cache. --smoke: tiny sizes on the CPU.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from peer_torch import Gpt2


def step_seconds(model, loss_of, optimizer, ids, targets, seconds, device):
    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(3):
        step()
    wait()
    steps, start = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - start < seconds:
        loss = step()
        wait()
        steps += 1
    assert torch.isfinite(loss)
    return (time.perf_counter() - start) / steps


def measure(name, layers, channels, heads, batch, context, vocabulary, seconds, device):
    while True:
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            torch.manual_seed(1)
            model = Gpt2(vocabulary, context, layers, channels, heads)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                          weight_decay=0.1, fused=device == "cuda")

            def loss_of(ids, targets):
                return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())

            compiled = torch.compile(loss_of) if device == "cuda" else loss_of
            ids = torch.randint(vocabulary, (batch, context))
            took = step_seconds(model, compiled, optimizer, ids, ids.roll(-1, 1), seconds, device)
            break
        except torch.OutOfMemoryError:
            model = optimizer = loss_of = compiled = None
            batch //= 2
            if batch == 0:
                raise
    name = f"{name}.B{batch}"
    print(f"torch.step.{name}\t{took * 1e3:.6g}\tms")
    print(f"torch.tokens.{name}\t{batch * context / took:.6g}\ttokens/s", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=4)
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    torch.set_default_device(device)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.9)
    torch.set_float32_matmul_precision("high")
    backends = [SDPBackend.MATH] if args.smoke else [SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(backends):
        if args.smoke:
            for name in "124M", "1558M":
                measure(name, 2, 32, 2, 2, 32, 300, 0, device)
        else:
            measure("124M", 12, 768, 12, 64, 1024, 50304, args.seconds, device)
            measure("1558M", 48, 1600, 25, 32, 1024, 50304, args.seconds, device)


if __name__ == "__main__":
    main()
