"""Makes test/golden/parquet_rows/: parquet files of nested columns and of every type, by pyarrow,
polars and duckdb, and the rows that pyarrow reads from them, as JSON lines.

    python dev/golden/parquet_rows.py   (made with pyarrow 26.0.1, polars 2.1.0 and duckdb 2.0.1)

How a value is written as JSON: cake/parquet_rows.h, in its list of what becomes what.
"""

import datetime
import decimal
import json
import math
import os
import random
import uuid

import duckdb
import numpy
import polars
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = os.path.join(os.path.dirname(__file__), "../../test/golden/parquet_rows")
random.seed(17)


# -------------------------------------------------------------------------------------------------
# What pyarrow reads, as JSON


def without_zeros(text):
    return text.rstrip("0").rstrip(".") if "." in text else text


def as_json(value, kind):
    if value is None:
        return "null"
    if pa.types.is_map(kind):
        items = [(k if isinstance(k, str) else str(k), v) for k, v in value]
        return as_object((k, as_json(v, kind.item_type)) for k, v in items)
    if pa.types.is_struct(kind):
        return as_object((f.name, as_json(value[f.name], f.type)) for f in kind.fields)
    if pa.types.is_nested(kind):
        return "[" + ",".join(as_json(v, kind.value_type) for v in value) + "]"
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return str(numpy.float32(value)) if math.isfinite(value) else "null"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "null"
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, bytes):
        return text_as_json(value.decode("utf-8", "replace"))
    if isinstance(value, uuid.UUID):
        return text_as_json(str(value))
    if isinstance(value, datetime.datetime):
        time = without_zeros(value.replace(tzinfo=None).isoformat())
        return text_as_json(time + ("Z" if value.tzinfo else ""))
    if isinstance(value, (datetime.date, datetime.time)):
        return text_as_json(without_zeros(value.isoformat()))
    return text_as_json(value)


def text_as_json(value):
    return json.dumps(value, ensure_ascii=False)


def as_object(items):
    return "{" + ",".join(text_as_json(k) + ":" + v for k, v in items) + "}"


def read_rows(name):
    table = pq.read_table(f"{FOLDER}/{name}.parquet")
    rows = [
        [(f.name, as_json(row[f.name], f.type)) for f in table.schema] for row in table.to_pylist()
    ]
    return "".join(as_object(row) + "\n" for row in rows)


def write_jsonl(name, text):
    with open(f"{FOLDER}/{name}.jsonl", "w") as out:
        out.write(text)


def write(name, table, **options):
    options = {"write_statistics": False, "store_schema": False, **options}
    pq.write_table(table, f"{FOLDER}/{name}.parquet", **options)
    return read_rows(name)


# -------------------------------------------------------------------------------------------------
# Data sets as people have them


def maybe(value, null_share=0.2):
    return None if random.random() < null_share else value


def words(n):
    return " ".join(
        random.choice(["naïve", "日本", "a", '"quoted"', "line\nbreak"]) for _ in range(n)
    )


def messages():
    roles = ["system", "user", "assistant"]
    return [
        {"role": random.choice(roles), "content": maybe(words(random.randrange(4)), 0.1)}
        for _ in range(random.choice([0, 1, 2, 2, 9]))
    ]


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CONVERSATIONS = pa.schema(
    [
        ("messages", pa.list_(MESSAGE)),
        ("choices", pa.list_(pa.string())),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("numbers", pa.list_(pa.int64())),
        ("answer", pa.int64()),
        ("score", pa.float64()),
        ("flag", pa.bool_()),
        ("created", pa.timestamp("us")),
    ]
)


def conversations(rows):
    def row(i):
        return {
            "messages": maybe(messages(), 0.1),
            "choices": maybe([maybe(words(1)) for _ in range(random.randrange(4))]),
            "reward_model": maybe({"ground_truth": maybe(str(i)), "style": "rule"}),
            "numbers": maybe([maybe(i * n) for n in range(random.choice([0, 1, 6]))]),
            "answer": maybe(i * 10**14),
            "score": maybe(i / 7),
            "flag": maybe(i % 3 == 0),
            "created": maybe(
                datetime.datetime(2026, 1, 1) + datetime.timedelta(hours=i, microseconds=i)
            ),
        }

    return pa.Table.from_pylist([row(i) for i in range(rows)], CONVERSATIONS)


def conversation_files():
    table = conversations(20)
    pages = {"write_batch_size": 5, "data_page_size": 1, "row_group_size": 11}  # cut within lists
    plain = {"use_dictionary": False}
    few = {"use_dictionary": True, "dictionary_pagesize_limit": 40}  # then plain pages
    zstd1 = {"compression": "zstd", "data_page_version": "1.0"}
    snappy2 = {"compression": "snappy", "data_page_version": "2.0"}
    texts = {
        write("v1_dictionary", table, **zstd1, **few, **pages),
        write("v2_plain", table, **snappy2, **plain, **pages),
    }
    encodings = {
        "messages.list.element.role": "DELTA_LENGTH_BYTE_ARRAY",
        "messages.list.element.content": "DELTA_BYTE_ARRAY",
        "choices.list.element": "DELTA_BYTE_ARRAY",
        "reward_model.ground_truth": "DELTA_BYTE_ARRAY",
        "numbers.list.element": "DELTA_BINARY_PACKED",
        "answer": "BYTE_STREAM_SPLIT",
        "score": "BYTE_STREAM_SPLIT",
        "flag": "RLE",
        "created": "DELTA_BINARY_PACKED",
    }
    for options in [zstd1, snappy2]:
        name = f"v{options['data_page_version'][0]}_delta"
        texts.add(write(name, table, column_encoding=encodings, **options, **plain))
    polars.from_arrow(table).write_parquet(
        f"{FOLDER}/polars.parquet", row_group_size=13, statistics=False
    )
    texts.add(read_rows("polars"))
    connection = duckdb.connect()
    connection.register("t", table)
    for version in ["v1", "v2"]:
        path = f"{FOLDER}/duckdb_{version}.parquet"
        connection.execute(f"copy t to '{path}' (format parquet, parquet_version {version})")
        texts.add(read_rows(f"duckdb_{version}"))
    assert len(texts) == 1  # all of them hold the same rows
    write_jsonl("conversations", texts.pop())
    assert write("no_rows", table.slice(0, 0)) == ""
    row = "{" + ",".join(f'"{name}":null' for name in CONVERSATIONS.names) + "}\n"
    assert write("all_null", pa.Table.from_pylist([{}] * 100, CONVERSATIONS)) == row * 100


# -------------------------------------------------------------------------------------------------
# Nests, and types


def nest_file():
    deep = pa.list_(pa.list_(pa.struct([("a", pa.list_(pa.int32())), ("b", pa.string())])))
    map_type = pa.map_(pa.string(), pa.list_(pa.int64()))
    schema = pa.schema(
        [
            pa.field("deep", deep),
            pa.field("map", map_type),
            pa.field("by_number", pa.map_(pa.int32(), pa.string())),
            pa.field("maps", pa.list_(pa.map_(pa.string(), pa.int8()))),
            pa.field(
                "needed", pa.list_(pa.field("element", pa.int64(), nullable=False)), nullable=False
            ),
            pa.field("fixed", pa.list_(pa.int16(), 2)),
            pa.field(
                "structs", pa.struct([("x", pa.struct([("y", pa.struct([("z", pa.bool_())]))]))])
            ),
        ]
    )
    rows = [
        [[], [], [], [], [], [1, 2], {"x": {"y": {"z": True}}}],
        [None, None, None, None, [1], None, None],
        [[None], [("k", None)], [(1, None)], [None], [2, 3], [3, None], {"x": None}],
        [[[]], [("k", [])], [(2, ""), (-3, "c")], [[]], [], [4, 5], {"x": {"y": None}}],
        [
            [[None]],
            [("", [1, None]), ("é", [2])],
            [],
            [[("p", 1)], None, [("q", None)]],
            [],
            [6, 7],
            {"x": {"y": {"z": None}}},
        ],
        [
            [
                [{"a": None, "b": None}],
                None,
                [{"a": [], "b": "x"}, {"a": [None, 1], "b": None}, None],
            ],
            [("z", [9] * 20)],
            [(7, "seven")],
            [[("r", 5), ("s", 6)]],
            list(range(30)),
            None,
            None,
        ],
    ]
    table = pa.Table.from_pylist([dict(zip(schema.names, row)) for row in rows * 2], schema)
    options = {"write_batch_size": 3, "data_page_size": 1, "row_group_size": 7}
    text = write(
        "nests", table, use_dictionary=False, compression="gzip", data_page_version="2.0", **options
    )
    write_jsonl("nests", text)


def type_files():
    limits = {}
    for bits in [8, 16, 32, 64]:
        limits[f"int{bits}"] = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0, None]
        limits[f"uint{bits}"] = [0, 2**bits - 1, 1, None]
    columns = {name: pa.array(values, getattr(pa, name)()) for name, values in limits.items()}
    floats = [0.1, -0.0, math.nan, None]
    columns["half"] = pa.array(numpy.array([0.5, -2, 65504, 6e-8], numpy.float16))
    columns["float"] = pa.array(floats, pa.float32())
    columns["double"] = pa.array(floats, pa.float64())
    columns["large"] = pa.array([2.0**64, 1e300, -math.inf, 5e-324], pa.float64())
    columns["money"] = pa.array(
        [decimal.Decimal(x) for x in ["12.50", "-0.01", "0.00"]] + [None], pa.decimal128(7, 2)
    )
    digits = "12345678901234567890123456789012345678"
    columns["decimal"] = pa.array(
        [
            decimal.Decimal(f"{digits[:28]}.{digits[28:]}"),
            None,
            decimal.Decimal("-0.0000000001"),
            decimal.Decimal(0),
        ],
        pa.decimal128(38, 10),
    )
    columns["date"] = pa.array(
        [
            datetime.date(1, 1, 1),
            datetime.date(9999, 12, 31),
            datetime.date(2024, 2, 29),
            datetime.date(1969, 12, 31),
        ]
    )
    times = [
        datetime.time(0, 0),
        datetime.time(23, 59, 59, 999000),
        datetime.time(1, 2, 3, 500000),
        None,
    ]
    columns["time_ms"] = pa.array(times, pa.time32("ms"))
    columns["time_us"] = pa.array(times, pa.time64("us"))
    moments = [
        datetime.datetime(1900, 3, 1, 12),
        datetime.datetime(2026, 11, 27, 6, 30, 0, 123000),
        datetime.datetime(1969, 12, 31, 23, 59, 59, 999000),
        None,
    ]
    columns["moment_ms"] = pa.array(moments, pa.timestamp("ms"))
    columns["moment_us_utc"] = pa.array(moments, pa.timestamp("us", tz="UTC"))
    columns["bytes"] = pa.array([b"\x89PNG\r\n", b"", b"caf\xc3\xa9", None], pa.binary())
    columns["fixed"] = pa.array([b"abc", b"\x00\xff\xfe", b"   ", None], pa.binary(3))
    columns["nothing"] = pa.nulls(4)
    table = pa.table(columns)
    texts = {
        write("types_v1", table, data_page_version="1.0", compression="zstd"),
        write("types_v2", table, data_page_version="2.0", compression="zstd", use_dictionary=False),
    }
    assert len(texts) == 1
    write_jsonl("types", texts.pop())
    moments = pa.table({"moment": columns["moment_ms"]})
    write_jsonl("int96", write("int96", moments, use_deprecated_int96_timestamps=True))
    connection = duckdb.connect()
    path = f"{FOLDER}/duckdb_types.parquet"
    connection.execute(
        "copy (select * from (values"
        " ('00112233-4455-6677-8899-aabbccddeeff'::uuid, '{\"a\": [1, null]}'::json),"
        " (null, '\"text\"'::json), ('ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid, null)"
        f") t(id, data)) to '{path}' (format parquet)"
    )
    rows = [  # pyarrow reads JSON as strings
        '{"id":"00112233-4455-6677-8899-aabbccddeeff","data":{"a":[1,null]}}',
        '{"id":null,"data":"text"}',
        '{"id":"ffffffff-ffff-ffff-ffff-ffffffffffff","data":null}',
    ]
    write_jsonl("duckdb_types", "\n".join(rows) + "\n")


def refused_files():
    table = pa.table({"text": ["x", "y"], "numbers": [[1], [2, 3]]})
    options = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
    compression = {"text": "zstd", "numbers.list.element": "brotli"}
    pq.write_table(table, f"{FOLDER}/brotli.parquet", compression=compression, **options)
    path = f"{FOLDER}/interval.parquet"
    duckdb.connect().execute(
        f"copy (select 'x' as text, [interval 1 day] as spans) to '{path}' (format parquet)"
    )


if __name__ == "__main__":
    os.makedirs(FOLDER, exist_ok=True)
    conversation_files()
    nest_file()
    type_files()
    refused_files()
    sizes = {f: os.path.getsize(f"{FOLDER}/{f}") for f in sorted(os.listdir(FOLDER))}
    for name, size in sizes.items():
        print(f"{size:7} {name}")
    print(f"{sum(sizes.values()):7} in all")
