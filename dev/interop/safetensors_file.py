"""safetensors files with NumPy alone: dictionaries from names to arrays, in and out."""

import json
import pathlib

import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def write_safetensors(path, tensors):
    """As F32, in the order given."""
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape),
                        "data_offsets": [begin, begin + 4 * t.size]}
        begin += 4 * t.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(np.ascontiguousarray(t, "<f4").tobytes())


def read_safetensors(directory):
    """All tensors of a model directory as float32, sharded or not."""
    out = {}
    for path in sorted(pathlib.Path(directory).glob("model*.safetensors")):
        data = path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + n])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            t = np.frombuffer(data[8 + n + begin:8 + n + end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                t = (t.astype(np.uint32) << 16).view(np.float32)
            out[name] = t.astype(np.float32).reshape(entry["shape"])
    return out
