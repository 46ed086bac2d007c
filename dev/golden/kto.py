"""Goldens of KTO's loss on labelled answers, on pairs, and on both together.

    python dev/golden/kto.py [--out test/golden]

kto.json is read by test/test_reward_objectives.cpp. The
loss is written here as TRL's KTOTrainer computes it: losses of desirable answers
1 - sigmoid(beta (logratio - kl)), of undesirable ones 1 - sigmoid(beta (kl - logratio)), each times
the weight of its kind, concatenated, and their mean; kl is the mean log-ratio of mismatched
answers, not below 0, and a constant. The gradient is taken by a complex step, so that no derivative
is written down. Needs NumPy alone.
"""

import argparse
import json
import os

import numpy as np


def kto(logp, reference, good, kl, beta, desirable_weight, undesirable_weight):
    ratio = logp - reference
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    desirable = desirable_weight * (1 - sigmoid(beta * (ratio[good] - kl)))
    undesirable = undesirable_weight * (1 - sigmoid(beta * (kl - ratio[~good])))
    return np.concatenate([desirable, undesirable]).mean()


def gradient(loss, logp):
    steps = 1e-30j * np.eye(len(logp))
    return [loss(logp + step).imag / 1e-30 for step in steps]


def case(rng, name, singles, pairs, beta, desirable_weight, undesirable_weight, shift):
    """`singles`: labels. A pair is a good answer and a bad one."""
    good = np.array(list(singles) + [True, False] * pairs, dtype=bool)
    reference = -20 * rng.random(len(good))
    logp = reference + rng.normal(0, 3, len(good))
    mismatched = rng.normal(shift, 2, 4)
    kl = max(0.0, mismatched.mean())
    loss = lambda l: kto(l, reference, good, kl, beta, desirable_weight, undesirable_weight)
    return {
        "name": name,
        "singles": [bool(s) for s in singles],
        "pairs": pairs,
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "logp": logp.tolist(),
        "reference": reference.tolist(),
        "mismatched": mismatched.tolist(),
        "kl": kl,
        "loss": loss(logp.astype(complex)).real,
        "gradient": gradient(loss, logp.astype(complex)),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="test/golden")
    out = parser.parse_args().out
    rng = np.random.default_rng(1)
    cases = [
        case(rng, "labels", [1, 0, 0, 1, 0], 0, 0.1, 1, 1, 1.5),
        case(rng, "unequal classes", [1, 0, 0, 0, 0], 0, 0.2, 4, 1, 0.5),
        case(rng, "good answers alone", [1, 1, 1], 0, 0.1, 1, 2, 1.0),
        case(rng, "pairs", [], 3, 0.1, 1, 1, 1.0),
        case(rng, "labels and pairs", [0, 1, 0], 2, 0.3, 1.25, 0.75, 2.0),
        case(rng, "no KL below 0", [0, 1], 1, 0.1, 1, 1, -4.0),
    ]
    with open(os.path.join(out, "kto.json"), "w") as f:
        json.dump(cases, f, indent=1)
        f.write("\n")


main()
