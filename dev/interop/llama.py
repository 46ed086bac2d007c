#!/usr/bin/env python3
"""llama.cpp from Python, for comparisons: token ids, log-probabilities, greedy text, chat, speed.

The library is the one inside the package xllamacpp (pip install xllamacpp numpy), which exports
llama.cpp's C interface, or a libllama.so of your own: LLAMA_LIBRARY=path. The structures below are
those of include/llama.h; `matching_context_params` compares them with the library's own default
values before anything is called with them, so that another version is refused and not misread.

    dev/interop/llama.py ids FILE.gguf "text" [--special]
    dev/interop/llama.py logp FILE.gguf 504 3575 282 4649 314
    dev/interop/llama.py greedy FILE.gguf "text" --tokens 40
    dev/interop/llama.py chat FILE.gguf "a question"
    dev/interop/llama.py perplexity FILE.gguf TEXT --windows 40
    dev/interop/llama.py speed FILE.gguf --threads 2
    dev/interop/llama.py serve FILE.gguf --port 8081 --rows 8
"""

import argparse
import ctypes
import math
import os
import signal
import time

import numpy as np

c_bool, c_float, c_int, c_void_p = ctypes.c_bool, ctypes.c_float, ctypes.c_int32, ctypes.c_void_p
F32, F16, BF16 = 0, 1, 30  # ggml's types of the cache


class ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int),
        ("split_mode", c_int), ("load_mode", c_int), ("lazy_mode", c_int), ("main_gpu", c_int),
        ("tensor_split", c_void_p), ("progress_callback", c_void_p), ("user_data", c_void_p),
        ("kv_overrides", c_void_p), ("vocab_only", c_bool), ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool), ("no_host", c_bool), ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


CONTEXT_BEFORE_CALLBACKS = [
    ("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("n_ubatch", ctypes.c_uint32),
    ("n_seq_max", ctypes.c_uint32), ("n_rs_seq", ctypes.c_uint32),
    ("n_outputs_max", ctypes.c_uint32), ("n_outputs_max_per_seq", ctypes.c_uint32),
    ("n_threads", c_int), ("n_threads_batch", c_int), ("ctx_type", c_int),
    ("rope_scaling_type", c_int), ("pooling_type", c_int), ("attention_type", c_int),
    ("flash_attn_type", c_int), ("rope_freq_base", c_float), ("rope_freq_scale", c_float),
    ("yarn_ext_factor", c_float), ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float),
    ("yarn_beta_slow", c_float), ("yarn_orig_ctx", ctypes.c_uint32), ("defrag_thold", c_float),
    ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int), ("type_v", c_int),
]
CONTEXT_BEHIND_CALLBACKS = [
    ("embeddings", c_bool), ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool),
    ("swa_full", c_bool), ("kv_unified", c_bool), ("samplers", c_void_p),
    ("n_samplers", ctypes.c_size_t), ("ctx_other", c_void_p),
    ("spare", ctypes.c_uint8 * 64),  # returned by address: room for a longer structure
]


def context_params(callbacks):
    """The structure of the versions that have so many pointers behind type_v."""
    fields = [("callbacks", c_void_p * callbacks)]
    return type("ContextParams", (ctypes.Structure,), {
        "_fields_": CONTEXT_BEFORE_CALLBACKS + fields + CONTEXT_BEHIND_CALLBACKS})


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int), ("token", ctypes.POINTER(c_int)), ("embd", c_void_p),
        ("pos", ctypes.POINTER(c_int)), ("n_seq_id", ctypes.POINTER(c_int)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(c_int))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)
lines = []  # what llama.cpp logged: shown when a call fails
keep_log = LOG(lambda level, text, data: lines.append(text.decode(errors="replace")))


def load_library():
    path = os.environ.get("LLAMA_LIBRARY")
    if not path:
        import xllamacpp
        path = xllamacpp.xllamacpp.__file__
    library = ctypes.CDLL(path)
    ContextParams = matching_context_params(library, path)
    signatures = {
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_load_from_file": (c_void_p, [ctypes.c_char_p, ModelParams]),
        "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_model_n_ctx_train": (c_int, [c_void_p]),
        "llama_model_desc": (c_int, [c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
        "llama_model_free": (None, [c_void_p]),
        "llama_free": (None, [c_void_p]),
        "llama_vocab_n_tokens": (c_int, [c_void_p]),
        "llama_vocab_is_eog": (c_bool, [c_void_p, c_int]),
        "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
        "llama_tokenize": (c_int, [c_void_p, ctypes.c_char_p, c_int, ctypes.POINTER(c_int), c_int,
                                   c_bool, c_bool]),
        "llama_token_to_piece": (c_int, [c_void_p, c_int, ctypes.c_char_p, c_int, c_int, c_bool]),
        "llama_get_memory": (c_void_p, [c_void_p]),
        "llama_memory_clear": (None, [c_void_p, c_bool]),
        "llama_batch_init": (Batch, [c_int, c_int, c_int]),
        "llama_batch_free": (None, [Batch]),
        "llama_decode": (c_int, [c_void_p, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(c_float), [c_void_p, c_int]),
        "llama_print_system_info": (ctypes.c_char_p, []),
        "llama_log_set": (None, [LOG, c_void_p]),
        "llama_backend_init": (None, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(keep_log, None)
    library.llama_backend_init()
    return library


def matching_context_params(library, path):
    """The ContextParams of this library, known by its default values."""
    library.llama_model_default_params.restype = ModelParams
    m = library.llama_model_default_params()
    model = [m.n_gpu_layers, m.split_mode, m.load_mode, m.lazy_mode, m.main_gpu, m.vocab_only,
             m.check_tensors, m.use_extra_bufts, m.no_host, m.no_alloc]
    for callbacks in (2, 3):
        kind = context_params(callbacks)
        library.llama_context_default_params.restype = kind
        c = library.llama_context_default_params()
        context = [c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max, c.n_outputs_max_per_seq,
                   c.rope_scaling_type, c.attention_type, c.flash_attn_type, c.rope_freq_base,
                   c.yarn_ext_factor, c.yarn_beta_slow, c.yarn_orig_ctx, c.defrag_thold, c.type_k,
                   c.type_v, c.embeddings, c.offload_kqv, c.no_perf, c.op_offload, c.swa_full,
                   c.kv_unified, c.n_samplers]
        if (model == [-1, 1, -1, 1, 0, False, False, True, False, False] and
                context == [512, 2048, 512, 1, 1, -1, -1, -1, 0, -1, -1, 0, -1, F16, F16, False,
                            True, True, True, True, False, 0]):
            return kind
    raise SystemExit(f"{path}: llama.cpp's structures are not those of this script: "
                     f"found default values {model} and {context}")


class Llama:
    """A model on the CPU, with a cache of keys and values in f32 and no flash attention."""

    library = None

    def __init__(self, path, context=1024, threads=2, cache=F32, batch=512, repack=True):
        if Llama.library is None:
            Llama.library = load_library()
        self.path = str(path)
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = repack  # weights in an order that suits this CPU
        del lines[:]
        self.model = self.library.llama_model_load_from_file(self.path.encode(), params)
        if not self.model:
            raise RuntimeError(f"{path}: llama.cpp did not load it:\n" + "".join(lines[-12:]))
        self.vocab = self.library.llama_model_get_vocab(self.model)
        self.V = self.library.llama_vocab_n_tokens(self.vocab)
        self.T = self.library.llama_model_n_ctx_train(self.model)
        params = self.library.llama_context_default_params()
        params.n_ctx = min(context, self.T)
        params.n_batch = params.n_ubatch = batch
        # Positions of a batch whose logits are read.
        params.n_outputs_max = params.n_outputs_max_per_seq = batch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = cache
        params.flash_attn_type = 0
        params.no_perf = True
        self.context = self.library.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"{path}: llama.cpp made no context:\n" + "".join(lines[-12:]))
        self.batch_size = batch
        self.batch = self.library.llama_batch_init(batch, 0, 1)
        self.length = 0  # tokens in the cache

    def close(self):
        if self.context:
            self.library.llama_batch_free(self.batch)
            self.library.llama_free(self.context)
            self.library.llama_model_free(self.model)
        self.context = self.model = None

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    # -- text

    def tokenize(self, text, special=False, add=False):
        """Ids. `special`: names of special tokens are these tokens; `add`: with the file's BOS."""
        data = text.encode()
        out = (c_int * (len(data) + 16))()
        n = self.library.llama_tokenize(self.vocab, data, len(data), out, len(out), add, special)
        assert n >= 0, "llama_tokenize found more tokens than bytes"
        return list(out[:n])

    def piece(self, token, special=True):
        out = ctypes.create_string_buffer(1024)
        n = self.library.llama_token_to_piece(self.vocab, token, out, len(out), 0, special)
        assert n >= 0, "llama_token_to_piece found a token of more than 1024 bytes"
        return out.raw[:n]

    def text(self, ids, special=True):
        return b"".join(self.piece(i, special) for i in ids).decode(errors="replace")

    def ends(self, token):
        return bool(self.library.llama_vocab_is_eog(self.vocab, token))

    def adds_bos(self):
        return bool(self.library.llama_vocab_get_add_bos(self.vocab))

    # -- logits

    def clear(self):
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.length = 0

    def feed(self, ids, every=False):
        """Appends ids. Returns the logits behind the last one, or behind each of them: (N, V)."""
        rows = []
        for begin in range(0, len(ids), self.batch_size):
            part = ids[begin:begin + self.batch_size]
            b = self.batch
            b.n_tokens = len(part)
            last = begin + len(part) == len(ids)
            for i, token in enumerate(part):
                b.token[i], b.pos[i], b.n_seq_id[i] = int(token), self.length + i, 1
                b.seq_id[i][0] = 0
                b.logits[i] = every or (last and i + 1 == len(part))
            status = self.library.llama_decode(self.context, b)
            if status != 0:
                raise RuntimeError(f"{self.path}: llama_decode: {status}: " + "".join(lines[-3:]))
            self.length += len(part)
            if every:
                for i in range(len(part)):
                    p = self.library.llama_get_logits_ith(self.context, i)
                    rows.append(np.ctypeslib.as_array(p, (self.V,)).copy())
            elif last:
                p = self.library.llama_get_logits_ith(self.context, -1)
                rows.append(np.ctypeslib.as_array(p, (self.V,)).copy())
        return np.array(rows) if every else rows[0]

    def logits(self, ids):
        self.clear()
        return self.feed(ids, every=True)

    def logp(self, ids):
        """Log-probability of ids[1:], each given those before it."""
        x = self.logits(ids[:-1]).astype(np.float64)
        x -= x.max(1, keepdims=True)
        x -= np.log(np.exp(x).sum(1, keepdims=True))
        return x[np.arange(len(ids) - 1), ids[1:]]

    def greedy(self, ids, n, stop=True):
        """Ids that continue `ids`, with the margin between the two best logits of each."""
        self.clear()
        x = self.feed(ids)
        out, margins = [], []
        while len(out) < n:
            best = int(x.argmax())
            second, first = np.partition(x, -2)[-2:]
            out.append(best)
            margins.append(float(first - second))
            if (stop and self.ends(best)) or len(out) == n:
                break
            x = self.feed([best])
        return out, margins

    # -- measurements

    def perplexity(self, windows):
        """exp of the mean loss over the second half of each window of ids."""
        total, n = 0.0, 0
        for w in windows:
            logp = self.logp(w)[len(w) // 2 - 1:]  # of w[len/2:]
            total -= logp.sum()
            n += len(logp)
        return math.exp(total / n)

    def speed(self, tokens=64, warm_up=16, prompt=(1,)):
        """Tokens a second of decoding one row behind a short prompt."""
        self.clear()
        self.feed(list(prompt))
        token = int(prompt[-1])
        for _ in range(warm_up):
            self.feed([token])
        begin = time.perf_counter()
        for _ in range(tokens):
            self.feed([token])
        return tokens / (time.perf_counter() - begin)


def windows_of(ids, size, count):
    """`count` windows of `size` ids, spread evenly over the text; all of them for count 0."""
    whole = len(ids) // size
    count = min(count or whole, whole)
    return [ids[size * (i * whole // count):][:size] for i in range(count)]


def chat(path, conversations, max_tokens=128, context=1024, threads=2):
    """Greedy answers through llama.cpp's server and the file's own template, one for each list of
    messages: {"messages", "prompt" as the template renders it, "content", "finish_reason"}, where
    the reason is "stop" if the model ended its turn itself."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.use_jinja = True
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    out = []
    for messages in conversations:
        answer = server.handle_chat_completions(
            {"messages": messages, "temperature": 0, "max_tokens": max_tokens,
             "cache_prompt": False, "verbose": True, "__verbose": True})
        if "choices" not in answer:
            raise RuntimeError(f"{path}: llama.cpp's server: {answer}")
        choice = answer["choices"][0]
        out.append({"messages": messages, "prompt": answer["__verbose"]["prompt"],
                    "content": choice["message"].get("content") or "",
                    "finish_reason": choice["finish_reason"]})
    return out


def serve(path, port, rows, context, threads):
    """llama.cpp's HTTP server, until this process is killed. `context`: of each of the rows."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.port = port
    params.n_ctx = rows * context
    params.n_parallel = rows
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = -1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["ids", "logp", "greedy", "chat", "perplexity", "speed",
                                         "serve"])
    parser.add_argument("model")
    parser.add_argument("words", nargs="*", help="a text, a file, or ids")
    parser.add_argument("--special", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8081, help="of serve")
    parser.add_argument("--rows", type=int, default=8, help="of serve: requests side by side")
    parser.add_argument("--context", type=int, default=1024, help="of serve: tokens of each")
    o = parser.parse_args()
    if o.what == "serve":
        serve(o.model, o.port, o.rows, o.context, o.threads)
    text = " ".join(o.words)
    if o.what == "chat":
        answer = chat(o.model, [[{"role": "user", "content": text}]], o.tokens,
                      threads=o.threads)[0]
        print(answer["prompt"] + answer["content"], f"({answer['finish_reason']})")
        return
    with Llama(o.model, threads=o.threads) as m:
        if o.what == "ids":
            print(*m.tokenize(text, o.special))
        elif o.what == "logp":
            ids = [int(w) for w in o.words]
            x = m.logits(ids)[-1]
            print("logp", *(f"{v:.6f}" for v in m.logp(ids)))
            print("behind them", *(f"{i} {x[i]:.4f}" for i in np.argsort(-x)[:5]))
        elif o.what == "greedy":
            ids, margins = m.greedy(m.tokenize(text, True), o.tokens)
            print(*ids)
            print(repr(m.text(ids)), f"smallest margin {min(margins):.5f}")
        elif o.what == "perplexity":
            ids = m.tokenize(open(o.words[0], encoding="utf-8").read())
            begin = time.perf_counter()
            value = m.perplexity(windows_of(ids, o.window, o.windows))
            print(f"{value:.4f} on {o.windows} windows of {o.window}, "
                  f"{time.perf_counter() - begin:.1f} s")
        else:
            print(f"{m.speed(o.tokens):.1f} tokens/s")


if __name__ == "__main__":
    main()
