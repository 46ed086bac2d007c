"""Makes test/golden/parquet/*.parquet by pyarrow and by polars.

    python dev/golden/parquet.py        (made with pyarrow 26.0.1 and polars 2.1.0)

Every value is a formula of the row's number, which test/test_parquet.cpp has too, so that only the
files are stored. Columns of a whole file: text, colour, count, small, unsigned and what is not
read: ratio, list, pair.
"""

import os

import polars
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = os.path.join(os.path.dirname(__file__), "../../test/golden/parquet")


def text(i):
    if i % 7 == 3:
        return None
    return "" if i % 50 == 0 else f"document {i}: naïve 日本" + " word" * (i * 37 % 11)


def colour(i):
    return None if i % 5 == 4 else ["red", "green", "blue"][i * i % 3]


def count(i):
    return None if i % 11 == 6 else i * 2654435761 * 10**6 * (1 if i % 2 else -1)


def small(i):
    return i * 7919 % 1000 - 500


def table(rows, begin=0):
    n = range(begin, begin + rows)
    return pa.table(
        {
            "text": pa.array([text(i) for i in n], pa.string()),
            "ratio": pa.array([i / 3 for i in n], pa.float64()),
            "colour": pa.array([colour(i) for i in n], pa.string()),
            "count": pa.array([count(i) for i in n], pa.int64()),
            "list": pa.array([[i, i + 1][: i % 3] for i in n], pa.list_(pa.int64())),
            "small": pa.array([small(i) for i in n], pa.int32()),
            "pair": pa.array(
                [{"a": i, "b": text(i)} for i in n], pa.struct([("a", pa.int64()), ("b", pa.string())])
            ),
            "unsigned": pa.array([2**64 - 1 - i for i in n], pa.uint64()),
            "unsigned32": pa.array([2**32 - 1 - i for i in n], pa.uint32()),
        },
        schema=pa.schema(
            [
                ("text", pa.string()),
                ("ratio", pa.float64()),
                ("colour", pa.string()),
                ("count", pa.int64()),
                ("list", pa.list_(pa.int64())),
                pa.field("small", pa.int32(), nullable=False),
                ("pair", pa.struct([("a", pa.int64()), ("b", pa.string())])),
                ("unsigned", pa.uint64()),
                ("unsigned32", pa.uint32()),
            ]
        ),
    )


FLAT = ["text", "colour", "count", "small", "unsigned", "unsigned32"]


def write(name, data, **options):
    options = {"write_statistics": False, "store_schema": False, **options}
    pq.write_table(data, f"{FOLDER}/{name}.parquet", **options)


def pyarrow_files():
    pages = {"write_batch_size": 8, "data_page_size": 300}  # many pages of a few rows
    write("pyarrow_plain", table(30), compression="none", use_dictionary=False)
    for codec in ["none", "snappy", "gzip", "zstd"]:
        for version in ["1.0", "2.0"]:
            write(
                f"pyarrow_{codec}_v{version[0]}",
                table(50).select(FLAT),
                compression=codec,
                data_page_version=version,
                row_group_size=24,
                use_dictionary=["colour", "small"],
                write_page_checksum=version == "1.0",
                **pages,
            )
    write(  # dictionaries that grow too large: plain pages follow
        "pyarrow_fallback",
        table(100).select(FLAT),
        compression="zstd",
        dictionary_pagesize_limit=500,
        **pages,
    )
    for version in ["1.0", "2.0"]:
        write(
            f"pyarrow_delta_v{version[0]}",
            table(150).select(FLAT),
            compression="zstd",
            use_dictionary=False,
            data_page_version=version,
            column_encoding={
                "text": "DELTA_LENGTH_BYTE_ARRAY",
                "colour": "DELTA_LENGTH_BYTE_ARRAY",
                "count": "DELTA_BINARY_PACKED",
                "small": "DELTA_BINARY_PACKED",
                "unsigned": "DELTA_BINARY_PACKED",
                "unsigned32": "DELTA_BINARY_PACKED",
            },
            write_batch_size=70,
            data_page_size=300,
        )
    write("pyarrow_empty", table(0))
    write("pyarrow_nulls", pa.table({"text": pa.array([None] * 1000, pa.string())}))
    write(  # strings of 300,000 bytes
        "pyarrow_large",
        pa.table({"text": [f"{i} " * (300000 // len(f"{i} ")) for i in range(4)]}),
        compression="zstd",
        use_dictionary=False,
    )
    write(  # what is refused: an encoding, and what is no integer
        "pyarrow_refused",
        pa.table(
            {
                "front": ["aa", "ab"],
                "text": ["x", "y"],
                "time": pa.array([1, 2], pa.timestamp("ms")),
                "fixed": pa.array([b"ab", b"cd"], pa.binary(2)),
                "bytes": pa.array([b"\xff\x00", b""], pa.binary()),
                "flag": [True, False],
            }
        ),
        use_dictionary=False,
        column_encoding={"front": "DELTA_BYTE_ARRAY"},
    )
    write("pyarrow_brotli", pa.table({"text": ["x", "y"]}), compression="brotli")


def polars_files():
    data = polars.from_arrow(table(50))
    for codec in ["uncompressed", "snappy", "gzip", "zstd"]:
        data.select(FLAT).write_parquet(
            f"{FOLDER}/polars_{codec}.parquet",
            compression=codec,
            row_group_size=24,
            data_page_size=400,
            statistics=False,
        )
    data.write_parquet(f"{FOLDER}/polars_default.parquet")


if __name__ == "__main__":
    os.makedirs(FOLDER, exist_ok=True)
    pyarrow_files()
    polars_files()
    sizes = {f: os.path.getsize(f"{FOLDER}/{f}") for f in sorted(os.listdir(FOLDER))}
    for name, size in sizes.items():
        print(f"{size:7} {name}")
    print(f"{sum(sizes.values()):7} in all")
