"""What the goldens' scripts share: the weight formula, the table's names in Hugging Face's models.

Weights are never committed: the value of element i of the tensor NAME of make_table (cake/gpt.h),
(out, in) row-major, is

    float(scale * (2 * uniform01(mix64(hash64(NAME), i)) - 1))  (+ 1 for a norm's weight)

with the generator of cake/run.h and a scale that keeps the logits lively: .5 for embeddings and
positions, 1.5 / sqrt(in) for matrices and heads, .1 for vectors. test/test_goldens.cpp has the same
formula, so that only results have to be stored.
"""

import numpy as np
import torch
import transformers


def mix64(x):
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash64(text):
    """Of a str or bytes: FNV-1a, then mixed."""
    h = 0xCBF29CE484222325
    for c in text.encode() if isinstance(text, str) else text:
        h = (h ^ c) * 0x100000001B3 % 2**64
    return mix64(h)


def uniform(name, n):
    """n doubles in (0, 1): uniform01(mix64(hash64(name), i))."""
    bits = mix64(mix64(hash64(name)) ^ np.arange(n, dtype=np.uint64))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def signed(name, n):
    """n float32 in (-1, 1)."""
    return (2 * uniform(name, n) - 1).astype(np.float32)


def ids(name, n, below):
    return np.minimum((uniform(name, n) * below).astype(np.int64), below - 1)


def make_model(c, dtype=torch.float64):
    """A transformers model of the config `c` (cake's letters), with the formula's weights."""
    shape = dict(vocab_size=c["V"], tie_word_embeddings=c["tied"], bos_token_id=0, eos_token_id=0,
                 pad_token_id=0)
    if c["family"] == "gpt2":
        kind = "GPT2"
        config = transformers.GPT2Config(
            n_positions=c["T"], n_embd=c["C"], n_layer=c["L"], n_head=c["NH"],
            n_inner=None if c["F"] == 4 * c["C"] else c["F"], layer_norm_epsilon=c["norm_eps"],
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape)
    else:
        kind = {"llama": "Llama", "qwen3": "Qwen3", "qwen2": "Qwen2", "mistral": "Mistral"}[c["family"]]
        rope = dict(rope_type="default", rope_theta=c["rope_theta"])
        if c["rope_linear"]:
            rope = dict(rope_type="linear", rope_theta=c["rope_theta"], factor=c["rope_factor"])
        elif c["rope_factor"]:
            rope = dict(rope_type="llama3", rope_theta=c["rope_theta"], factor=c["rope_factor"],
                        low_freq_factor=c["rope_low"], high_freq_factor=c["rope_high"],
                        original_max_position_embeddings=c["rope_original_T"])
        if kind == "Mistral":
            shape["sliding_window"] = None
        config = getattr(transformers, kind + "Config")(
            max_position_embeddings=c["T"], hidden_size=c["C"], num_hidden_layers=c["L"],
            num_attention_heads=c["NH"], num_key_value_heads=c["NKV"], head_dim=c["HS"],
            intermediate_size=c["F"], rms_norm_eps=c["norm_eps"], rope_parameters=rope, **shape)
    if c["head"] == "scalar":
        config.num_labels = 1
    suffix = "ForSequenceClassification" if c["head"] == "scalar" else (
        "LMHeadModel" if kind == "GPT2" else "ForCausalLM")
    # sdpa and not eager, which computes the softmax of a float64 model in float32
    config._attn_implementation = "sdpa"
    model = getattr(transformers, kind + suffix)(config).to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # the pad token's, which would get no gradient
    with torch.no_grad():
        for row in table(model, c):
            row.set(torch.from_numpy(row.formula()).to(dtype))
    return model.train()


class Row:
    """One row of make_table: a view (out, in) or (out) of a Hugging Face parameter."""

    def __init__(self, name, parameter, kind, begin=0, out=None, transposed=False, decay=False):
        self.name, self.parameter, self.kind = name, parameter, kind
        self.begin, self.transposed, self.decay = begin, transposed, decay
        self.out = out or parameter.shape[0]
        self.norm_weight = "norm" in name and name.endswith(".weight")

    def view(self, tensor):
        if self.transposed:
            tensor = tensor.T
        return tensor[self.begin : self.begin + self.out]

    def set(self, value):
        self.view(self.parameter.data).copy_(value)

    def weight(self):
        return self.view(self.parameter.detach()).contiguous()

    def gradient(self):
        return self.view(self.parameter.grad).contiguous()

    def formula(self):
        shape = self.view(self.parameter.data).shape
        scale = {"embedding": 0.5, "position": 0.5, "vector": 0.1}.get(self.kind)
        if scale is None:
            scale = 1.5 / np.sqrt(float(shape[1]))
        n = int(np.prod(shape))
        value = (scale * (2 * uniform(self.name, n) - 1)).astype(np.float32)
        if self.norm_weight:
            value = value + np.float32(1)
        return value.reshape(shape)


def table(model, c):
    """The rows in the order of make_table."""
    parameters = dict(model.named_parameters())
    g = c["family"] == "gpt2"
    root = "transformer." if g else "model."
    q, kv = c["NH"] * c["HS"], c["NKV"] * c["HS"]
    rows = []

    def vector(name, disk):
        rows.append(Row(name, parameters[disk], "vector"))

    def norm(name, disk):
        vector(name + ".weight", disk + ".weight")
        if g:
            vector(name + ".bias", disk + ".bias")

    def linear(parts, bias=g):  # (name, outputs, name on disk)
        for what in ("weight", "bias") if bias else ("weight",):
            begin = 0
            for name, out, disk in parts:
                fused = g and len(parts) > 1
                rows.append(Row(f"{name}.{what}", parameters[f"{disk}.{what}"],
                                "matrix" if what == "weight" else "vector",
                                begin if fused else 0, out, g and what == "weight",
                                what == "weight"))
                begin += out

    rows.append(Row("wte", parameters[root + ("wte.weight" if g else "embed_tokens.weight")],
                    "embedding"))
    if g:
        rows.append(Row("wpe", parameters[root + "wpe.weight"], "position"))
    for i in range(c["L"]):
        b, d = f"blocks.{i}.", f"{root}{'h' if g else 'layers'}.{i}."
        attn = d + ("attn." if g else "self_attn.")
        norm(b + "norm1", d + ("ln_1" if g else "input_layernorm"))
        linear([(b + n, out, attn + ("c_attn" if g else n + "_proj"))
                for n, out in (("q", q), ("k", kv), ("v", kv))], bias=g or c["family"] == "qwen2")
        if c["family"] == "qwen3":
            vector(b + "q_norm.weight", attn + "q_norm.weight")
            vector(b + "k_norm.weight", attn + "k_norm.weight")
        linear([(b + "o", c["C"], attn + ("c_proj" if g else "o_proj"))])
        norm(b + "norm2", d + ("ln_2" if g else "post_attention_layernorm"))
        if g:
            linear([(b + "up", c["F"], d + "mlp.c_fc")])
        else:
            linear([(b + n, c["F"], f"{d}mlp.{n}_proj") for n in ("gate", "up")])
        linear([(b + "down", c["C"], d + ("mlp.c_proj" if g else "mlp.down_proj"))])
    norm("final_norm", root + ("ln_f" if g else "norm"))
    if c["head"] == "scalar":
        rows.append(Row("score", parameters["score.weight"], "head"))
    elif not c["tied"]:
        rows.append(Row("head", parameters["lm_head.weight"], "head", decay=True))
    return rows


def config(family, **letters):
    """cake's Config by its letters, with what is absent at the values of cake/gpt.h."""
    c = dict(family=family, head="lm", tied=False, norm_eps=1e-6, rope_theta=10000.0,
             rope_factor=0.0, rope_low=1.0, rope_high=4.0, rope_original_T=8192, rope_linear=False)
    c.update(letters)
    c.setdefault("NKV", c["NH"])
    c.setdefault("HS", c["C"] // c["NH"])
    c.setdefault("F", 4 * c["C"])
    return c
