"""A file of examples to objects: one JSON object per line, or a JSON array of them, in UTF-8.

What is no such file is told by what it is and what to do; nothing here knows what a line may hold.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemlax.errors import Error

__all__ = ["check_file", "quote", "read_lines"]

_BOM = b"\xef\xbb\xbf"
_SHOWN = 80  # characters of a value that an error quotes
_PANDAS = "python -c \"import pandas; pandas.{reader}.to_json('{stem}.jsonl', {how})\""
_JSONL = "orient='records', lines=True"
# What files of other kinds begin with, what they are, and what makes JSONL of them.
_KINDS = (
    (b"\x1f\x8b", "compressed by gzip", "gunzip -k {name}"),
    (b"PK\x03\x04", "a zip archive", "unzip {name}"),
    (b"(\xb5/\xfd", "compressed by zstd", "zstd -d {name}"),
    (b"PAR1", "a Parquet file", _PANDAS.replace("{reader}", "read_parquet('{name}')")),
    (b"ARROW1", "an Arrow file", _PANDAS.replace("{reader}", "read_feather('{name}')")),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 {name} > {stem}.utf8.jsonl"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 {name} > {stem}.utf8.jsonl"),
    (b"version https:", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"<!DOCTYPE", "a web page, not a download", None),
    (b"<!doctype", "a web page, not a download", None),
    (b"<html", "a web page, not a download", None),
)  # fmt: skip
_TABLES = {
    ",": "read_csv('{name}')", "\t": "read_table('{name}')", ";": "read_csv('{name}', sep=';')",
}  # fmt: skip
_SUFFIXES = {".csv": _TABLES[","], ".tsv": _TABLES["\t"], ".xlsx": "read_excel('{name}')"}
# The first line of a table: names of columns, the first perhaps without, as pandas writes an index.
_CELL = r'"?[A-Za-z_][\w.-]*"?'
_NAMES = re.compile(rf"(?:{_CELL})?([,;\t]){_CELL}(?:\1{_CELL})*".encode())
_EXPECTED = "expected one JSON object per line (JSONL)"


def check_file(path: Path) -> None:
    """Look at how a file begins."""
    if path.is_dir():
        raise Error(f"{path} is a folder: give a file of examples in it")
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(_BOM).lstrip()
    except FileNotFoundError:
        raise Error(f"there is no file {path}") from None
    except OSError as error:
        raise Error(f"cannot read {path}: {error.strerror}") from error
    named = _NAMES.fullmatch(head.partition(b"\n")[0].rstrip())
    reader = _TABLES[named[1].decode()] if named else _SUFFIXES.get(path.suffix.lower())
    if reader is not None and not head.startswith(b"{"):
        raise _other(path, "a table", _PANDAS.replace("{reader}", reader))
    for magic, kind, command in _KINDS:
        if head.startswith(magic):
            raise _other(path, kind, command)


def _other(path: Path, kind: str, command: str | None) -> Error:
    text = f"{path} is {kind}: {_EXPECTED}"
    if command is not None:
        filled = command.format(name=path.name, stem=path.name.partition(".")[0], how=_JSONL)
        text += f"; make it with: {filled}"
    return Error(text)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a file, and where it stands, as errors name it."""
    check_file(path)
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")
    empty = True
    for where, line in _array(path) if is_array else _lines(path):
        yield where, line
        empty = False
    if empty:
        raise Error(f"{path} is empty: {_EXPECTED}")


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = (raw.removeprefix(_BOM) if number == 1 else raw).strip()
            if text:
                where = f"{path}, line {number}"
                yield where, _object(_parse(text, where), where)


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file that is one array, as exports of datasets are."""
    for number, item in enumerate(_parse(path.read_bytes().removeprefix(_BOM), str(path)), 1):
        where = f"{path}, item {number}"
        yield where, _object(item, where)


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Error(f"{where}: not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise Error(f"{where}: not JSON: {_fault(raw, error)}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Error(f"{where}: expected a JSON object, got {quote(value)}")
    return value


def _fault(raw: bytes, error: Exception) -> str:
    """Return what is wrong with a line in its writer's terms, where that can be told."""
    if raw.endswith(b",") and _is_json(raw[:-1]):
        return "a comma after the object; each line is one object and nothing else"
    if raw == b"{":
        return "the object goes on over several lines; write each in one (jq -c . does)"
    if raw.startswith(b"{'"):
        return "names in single quotes, as Python writes a dict; json.dumps writes JSON"
    if str(error).startswith("Extra data"):
        return f"more after the object; each line is one object and nothing else ({error})"
    return str(error)


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def quote(value: Any) -> str:
    """Return a value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
