"""Files read with one clear line for what cannot be, and written so that a kill leaves the last good one."""

import gzip
import json
import os
import zlib
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from plumbing import ranks
from plumbing.errors import DataError, RunError

# ---- What people bring ----

def read_bytes(path):
    """A whole file, decompressed when its name ends in .gz."""
    path = Path(path)
    try:
        content = gzip.open(path).read() if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a Git LFS pointer and not the file itself; run git lfs pull")
    return content

def read_json_data(path):
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON ({e})") from None

# ---- What a run writes ----
@contextmanager
def writing(path):
    """A full disk or a read-only folder is a RunError, whoever finds it."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise RunError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or e})") from None

@ranks.only_main
def write_atomically(path, write):
    """Call write(temporary path), flush what it wrote to disk, and rename."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            write(part)
            with open(part, "r+b") as f:
                os.fsync(f.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)  # on a full disk it would take the room that others need
            raise

def write_json(path, value):
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))
