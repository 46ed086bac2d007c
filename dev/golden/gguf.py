"""Makes test/golden/gguf/*.gguf with the package gguf.

    python dev/golden/gguf.py        (made with gguf 0.19.0 and numpy 2.4)

types.gguf     keys of every type of value; random blocks of every tensor type that cake reads,
               and beside each the float32 values that the package makes of them, as NAME.values.
rounding.gguf  rows of 32 values that are hard to round, and the package's q8_0, q4_0, f16 and bf16
               of them. NaN and infinity are left out: the package leaves their bytes to the CPU.
split-*.gguf   a model of three tensors in three files.
"""

import importlib.metadata
import os

import numpy as np

# This script has the name of the package: the folder must not be searched for it.
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path = [p for p in sys.path if os.path.abspath(p or ".") != FOLDER]

import gguf  # noqa: E402
from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf import GGUFValueType as Value  # noqa: E402

OUT = os.path.join(FOLDER, "../../test/golden/gguf")
BLOCKS = {Type.Q8_0: 3, Type.Q4_0: 3, Type.Q4_1: 3, Type.Q5_0: 3, Type.Q5_1: 3, Type.Q4_K: 2,
          Type.Q5_K: 2, Type.Q6_K: 2, Type.F16: 32, Type.BF16: 32}  # fmt: skip
# Where a block has its f16 numbers d and, if there is one, m or dmin.
HALVES = {Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2],
          Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208], Type.F16: [0], Type.BF16: []}  # fmt: skip


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(rng, kind):
    """Random bytes, with finite f16 numbers of either sign in the first block, then subnormal."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (BLOCKS[kind], size), np.uint8)
    for i, block in enumerate(blocks):
        for at in HALVES[kind]:
            half = np.float16(rng.normal() * (0.05 if i + 1 < len(blocks) else 3e-6))
            block[at : at + 2] = np.frombuffer(half.tobytes(), np.uint8)
    return blocks


def types():
    rng = np.random.default_rng(16)
    writer = gguf.GGUFWriter(os.path.join(OUT, "types.gguf"), "test")
    for kind, values in {
        Value.UINT8: [0, 255], Value.INT8: [-128, 127], Value.UINT16: [1, 65535],
        Value.INT16: [-32768, 32767], Value.UINT32: [2, 2**32 - 1],
        Value.INT32: [-(2**31), 2**31 - 1], Value.FLOAT32: [-0.5, 1e-5],
        Value.BOOL: [True, False], Value.STRING: ["", "naïve 日本"],
        Value.UINT64: [3, 2**63 - 1], Value.INT64: [-(2**63), 2**63 - 1],
        Value.FLOAT64: [0.1, -1e300],
    }.items():  # fmt: skip
        name = kind.name.lower()
        writer.add_key_value("first." + name, values[0], kind)
        writer.add_key_value("second." + name, values[1], kind)
        writer.add_key_value("list." + name, values, Value.ARRAY, sub_type=kind)
    writer.add_key_value("largest", 2**64 - 1, Value.UINT64)
    writer.add_custom_alignment(64)
    writer.add_tensor("f32", np.array([[1, -2, 3.5], [0, -0.0, 1e-40]], np.float32))
    for kind in BLOCKS:
        blocks = random_blocks(rng, kind)
        if kind == Type.F16:  # the package takes the type from the array
            writer.add_tensor("f16", blocks.view(np.float16).reshape(2, 16))
        else:
            writer.add_tensor(kind.name.lower(), blocks.reshape(1, -1), raw_dtype=kind)
        values = gguf.dequantize(blocks, kind).astype(np.float32)
        writer.add_tensor(kind.name.lower() + ".values", values.reshape(-1))
    write(writer)


def rows_of_two_roundings(rng, n):
    """Rows for q4_0 of values x for which x/d + 8.5 is below an integer, and is that integer when
    x/d is rounded to float32 before the sum is, as the package does and a fused sum does not."""
    rows = []
    while len(rows) < n:
        extreme = np.float32(rng.uniform(1, 2))
        inverse = np.float32(1) / (extreme / np.float32(-8))
        row = [extreme]
        for k in range(9, 16):
            middle = k - 8.5 - 2.0**-21  # its sum with 8.5 is a tie, and k is even in float32
            near = np.float32(middle / np.float64(inverse))
            for x in near + np.arange(-4, 5, dtype=np.float32) * np.spacing(near):
                if np.float64(x) * np.float64(inverse) < middle == x * inverse:
                    row.append(x)
        if len(row) > 1:
            rows.append(np.resize(np.array(row, np.float32), 32))
    return rows


def awkward_rows():
    rng = np.random.default_rng(61)
    largest = np.finfo(np.float32).max
    ramp = np.arange(32, dtype=np.float32)
    one = np.zeros(32, np.float32)
    one[5] = 1
    sign = np.where(ramp % 2 == 0, 1, -1)
    half_ties = (1 + (2 * ramp + 1) / 2048) * np.where(ramp % 3 == 0, -4, 4)  # between two f16
    rows = [
        0 * ramp, -0.0 * (ramp + 1), 0 * ramp * sign,  # +0, -0, both
        one, -one, 1000 * one + 0.001 * sign, -1000 * one + 0.001 * ramp,  # one large value
        sign, -sign, 0 * ramp + 3, 0 * ramp - 3,  # equal magnitudes
        np.append(127, ramp[:31] + 0.5), np.append(-127, ramp[:31] + 0.5),  # q8_0: d = 1, ties
        np.append(127, -ramp[:31] - 0.5), 4 * np.append(127, 96 + ramp[:31] + 0.5),
        np.append(127, np.nextafter(ramp[:31] + np.float32(0.5), np.float32(0))),
        np.append(-8, (ramp[:31] - 15) / 2), np.append(8, (ramp[:31] - 15) / 2),  # q4_0: d = +-1
        np.append(-8, np.nextafter((ramp[:31] - 15) / 2, np.float32(-9), dtype=np.float32)),
        np.append(-8, np.nextafter((ramp[:31] - 15) / 2, np.float32(9), dtype=np.float32)),
        half_ties, half_ties * 2.0**-15, half_ties * 2.0**-24,  # f16: the last two subnormal
        ramp * 2.0**-25, ramp * 2.0**-26 * sign,  # around the smallest f16
        np.append(127 * 2.0**-25, ramp[:31] * 2.0**-25),  # q8_0: d a tie between 0 and 2^-24
        np.append(127 * 3 * 2.0**-25, ramp[:31] * 2.0**-25),
        np.append(-8 * 2.0**-25, ramp[:31] * 2.0**-27), np.append(-8 * 3 * 2.0**-25, 0 * ramp[:31]),
        1e-40 * ramp, -1e-40 * ramp, 1e-45 * sign,  # subnormal in float32
        1.2e-38 * ramp * sign, 3e-37 * ramp * sign,  # 1/d beyond float32, and not
        65504 * sign, 65504 * (ramp + 1) / 32, 65504 * 8 * sign, 65504 * 127 * sign,
        largest * sign, largest * (ramp / 64), 0.9 * largest * one - sign,
        (1 + 2.0**-8 + 2.0**-7 * ramp) * sign, (1 + 3 * 2.0**-8) * (1 + ramp),  # bf16: ties
    ]  # fmt: skip
    rows += [rng.normal(0, scale, 32) for scale in (1e-6, 0.02, 0.02, 1, 30)]
    rows += [rng.uniform(-1, 1, 32), rng.standard_cauchy(32), np.exp(rng.normal(0, 6, 32))]
    rows += rows_of_two_roundings(rng, 4)
    return np.array(rows).astype(np.float32)


def rounding():
    rows = awkward_rows()
    writer = gguf.GGUFWriter(os.path.join(OUT, "rounding.gguf"), "test")
    writer.add_tensor("x", rows)
    with np.errstate(all="ignore"):
        for kind in (Type.Q8_0, Type.Q4_0, Type.BF16):
            writer.add_tensor(kind.name.lower(), gguf.quantize(rows, kind), raw_dtype=kind)
        writer.add_tensor("f16", gguf.quantize(rows, Type.F16))
    write(writer)


def split():
    writer = gguf.GGUFWriter(os.path.join(OUT, "split.gguf"), "test", split_max_tensors=1)
    writer.add_uint32("answer", 42)
    for name in "abc":
        writer.add_tensor(name, np.array([ord(name), 1], np.float32))
    write(writer)


print("gguf", importlib.metadata.version("gguf"), "numpy", np.__version__)
os.makedirs(OUT, exist_ok=True)
types()
rounding()
split()
