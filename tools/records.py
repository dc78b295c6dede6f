"""Files as people have them -> (place, record), place such as ":3", ": item 3" or ": row 3"."""

import ast
import csv
import io
import json
import re
import shlex
from collections import Counter
from importlib import import_module
from pathlib import Path

from plumbing import pairs
from plumbing.errors import DataError
from plumbing.files import read_bytes

OPENED_BY = {".xz": "lzma", ".bz2": "bz2"}  # not every Python has them
LISTS = ("messages", "conversations", "conversation", "responses", "scores", "history")

DATA_FILE = re.compile(r"\.(jsonl|json|csv|tsv|parquet|arrow)(\.(gz|xz|bz2))?$", re.IGNORECASE)

def only_file(path):
    """The file, or the one data file of a folder. DataError for a folder with none or several."""
    if not (path := Path(path)).is_dir():
        return path
    files = [p for p in sorted(path.rglob("*")) if DATA_FILE.search(p.name) and p.is_file()
             and not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if len(files) != 1:
        names = shlex.join(map(str, files[:5])) + " ..." * (len(files) > 5)
        raise DataError(f"{path}: a folder of {len(files)} data files; name those that are meant: {names}")
    return files[0]

def read(path, delimiter=None):
    """Yield (place, record) of a file; what is no JSON object stands there as a DataError."""
    kinds = [kind for kind in Path(path.name.lower()).suffixes if kind not in (".gz", *OPENED_BY)]
    kind = kinds[-1] if kinds else ""
    if kind in (".zip", ".zst", ".tar"):
        raise DataError(f"{path}: unpack it first (.gz, .xz and .bz2 are read)")
    content = decompressed(path)
    if kind in (".csv", ".tsv"):
        delimiter = delimiter or ("\t" if kind == ".tsv" else ",")
        yield from numbered("row", unfold(read_csv(path, content, delimiter)))
    elif kind in (".parquet", ".arrow"):
        yield from numbered("row", unfold(read_arrow(path, content, kind)))
    elif (items := read_array(path, content, kind)) is not None:
        yield from numbered("item", items)
    else:
        for place, line in pairs.lines_of(path, content):
            try:
                yield place, pairs.parse_json(line)
            except DataError as e:
                yield place, e

def decompressed(path):
    """The bytes of a file; what ends in .gz, .xz or .bz2 is decompressed."""
    content, module = read_bytes(path), OPENED_BY.get(path.suffix.lower())
    try:
        return import_module(module).decompress(content) if module else content
    except ImportError:
        raise DataError(f"{path}: this Python has no {module}; decompress the file first") from None
    except Exception as e:  # OSError, EOFError, ValueError, lzma.LZMAError
        raise DataError(f"{path}: {e}") from None

def numbered(name, records):
    return ((f": {name} {i}", record) for i, record in enumerate(records, 1))

def read_array(path, content, kind):
    """The items of a JSON array, or None for JSON lines: either may stand in a .json or a .jsonl file."""
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None  # lines_of says where
    if text[:1] != "[" and kind != ".json":
        return None
    try:
        items = pairs.parse_json(text)
    except DataError as e:
        if text[:1] == "{":
            return None  # lines
        raise DataError(f"{path}: {e}") from None
    if not isinstance(items, list) and "\n" in text:
        raise DataError(f"{path}: one JSON value over several lines; needed is an array of records")
    return items if isinstance(items, list) else None

def read_csv(path, content, delimiter):
    """The rows of a table with a header."""
    csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=delimiter)
        header = reader.fieldnames or []
        if twice := [key for key, n in Counter(header).items() if n > 1]:
            raise DataError(f"{path}: the column {json.dumps(twice[0])} twice")
        if len(header) == 1 and (other := [c for c in ";\t|," if c in header[0]]):
            raise DataError(f"{path}: has one column, {json.dumps(header[0])}; if that is several: "
                            f"--delimiter {other[0]!r}")
        for row in reader:
            wrong = "more" if None in row else "fewer" if None in row.values() else ""
            yield DataError(f"{wrong} cells than the header") if wrong else row
    except (UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: not a table in UTF-8 ({e})") from None

def read_arrow(path, content, kind):
    """The rows of a .parquet file, or of an .arrow file that datasets.save_to_disk wrote."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading {kind} needs pyarrow: pip install pyarrow") from None
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        return pyarrow.ipc.open_stream(content).read_all().to_pylist()
    except (OSError, OverflowError, pyarrow.ArrowException) as e:  # a date beyond Python's years overflows
        raise DataError(f"{path}: not a {kind} file ({str(e).splitlines()[0]})") from None

def unfold(rows):
    """The rows of a table. A column of texts becomes lists or objects only where a form asks for them: where
    every cell that holds something is the text, in JSON or as Python prints it, of what `asked_for` takes."""
    rows = list(rows)
    records = [row for row in rows if isinstance(row, dict)]
    for key in {key: None for row in records for key in row}:
        full = [row for row in records if row.get(key) not in (None, "")]
        if not all(isinstance(row[key], str) and row[key].lstrip()[:1] in ("[", "{") for row in full):
            continue
        for parse in (json.loads, ast.literal_eval):
            try:
                values = [parse(row[key]) for row in full]
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
            if all(asked_for(key, value) for value in values):
                for row, value in zip(full, values, strict=True):
                    row[key] = value
            break
    return rows

def asked_for(key, value):
    """Messages, an object with messages, segments, two outputs, or what stands under a key of LISTS."""
    if key in LISTS or (key == "output" and isinstance(value, list)):
        return key in LISTS or len(value) == 2
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(x, dict) and bool(
        {"role", "from", "messages"} & x.keys() or x.keys() == {"text", "scores"}) for x in items)
