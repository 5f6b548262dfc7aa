"""Reads text from files, line by line, in constant memory, and says exactly where a file is wrong.

A source is one of: two aligned text files; .txt, .tsv, .jsonl or .parquet; each text format also as .gz or .zst.
Lines end at "\\n" (or "\\r\\n") only: other Unicode line breaks are text, because splitting at them shifts aligned
files against each other.
An example is a tuple of strings, one for each name in `FIELDS[task]`.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from trilemma.config import Source
from trilemma.errors import ConfigError, DataError, nearest

Example = tuple[str, ...]
Attempt = Example | DataError

FIELDS: dict[str, tuple[str, ...]] = {
    "seq2seq": ("source", "target"),
    "classification": ("text", "label"),
    "language-model": ("text",),
    "masked-language-model": ("text",),
    "question-answering": ("tokens", "labels"),
    "probe": ("tokens", "labels"),
}
FORMATS = (".txt", ".tsv", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
OPTIONS = ("columns", "header", "keys", "documents")
DOCUMENTS = ("line", "blank", "file")

# Names that a record may use for each field, in the order of preference.
_KEYS = {
    "source": ("source", "src"),
    "target": ("target", "tgt"),
    "text": ("text",),
    "label": ("label",),
}


def is_streamed(task: str) -> bool:
    """Whether examples of this task are documents of a stream, rather than records."""
    return FIELDS[task] == ("text",)


def source_files(source: Source) -> list[Path]:
    """The files that a source reads; empty for a generated one."""
    return [Path(name) for name in (source.path, source.source, source.target) if name is not None]


def file_format(path: Path) -> str:
    """One of `FORMATS`: the name's ending, without a compression; any other ending is taken as plain text."""
    name = path.name[: -len(path.suffix)] if path.suffix in COMPRESSIONS else path.name
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS else ".txt"


def check_file(path: Path) -> None:
    """Raises `DataError` when `path` is missing, a folder, or empty."""
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if len(siblings) <= 1000 else ""
        raise DataError(f"{path}: no such file{hint if 'did you mean' in hint else ''}")
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")


def open_binary(path: Path) -> IO[bytes]:
    """Opens a file for reading bytes, unpacking .gz and .zst; `DataError` when it cannot be opened."""
    check_file(path)
    try:
        if path.suffix == ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        if path.suffix == ".zst":
            return _open_zstandard(path)
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs the package zstandard: pip install zstandard") from None
    import io

    stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
    return cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, stream)))


def _unpacking_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return (OSError, EOFError, zlib.error)
    return (OSError, EOFError, zlib.error, zstandard.ZstdError)


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes with the line end) of a file; `DataError` where a packed file is damaged."""
    number = 0
    with open_binary(path) as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                yield number, raw
        except _unpacking_errors() as error:
            raise DataError(f"{path}: damaged or truncated after line {number}: {error}") from None
    if number == 0:
        raise DataError(f"{path}: the file is empty")


def decode_line(raw: bytes, path: Path, number: int) -> str:
    """One line as text; `DataError` names file, line and byte of invalid UTF-8. A byte-order mark is removed."""
    if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        raise DataError(
            f"{path}:{number}: invalid UTF-8 at byte {error.start + 1} of the line (0x{bad:02x}); "
            f"convert the file, for example: iconv -f ISO-8859-1 -t UTF-8"
        ) from None


def strip_end(raw: bytes) -> bytes:
    """A line without its "\\n" or "\\r\\n"."""
    if raw.endswith(b"\r\n"):
        return raw[:-2]
    return raw[:-1] if raw.endswith(b"\n") else raw


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without the line end) of a text file."""
    for number, raw in raw_lines(path):
        yield number, decode_line(strip_end(raw), path, number)


def _aligned(source: Path, target: Path) -> Iterator[Attempt]:
    left, right = raw_lines(source), raw_lines(target)
    for number, (first, second) in enumerate(itertools.zip_longest(left, right), start=1):
        if first is None or second is None:
            rest = number + sum(1 for _ in (right if first is None else left))
            longer, shorter = (target, source) if first is None else (source, target)
            yield DataError(
                f"{longer}:{number}: this line has no partner in {shorter}: "
                f"{longer} has {rest:,} lines, {shorter} has {number - 1:,}"
            )
            return
        try:
            yield (
                decode_line(strip_end(first[1]), source, number),
                decode_line(strip_end(second[1]), target, number),
            )
        except DataError as error:
            yield error


LineParser = Callable[[str, str], Example]  # (text of the line, "file:line") -> example


def _plain_parser(path: Path, fields: tuple[str, ...], options: dict[str, Any]) -> LineParser:
    if len(fields) > 1:
        raise DataError(
            f"{path}: plain text holds one text a line, but {_expected(fields)} are needed: use .tsv or .jsonl"
            f"{', or aligned files: source with target' if fields[0] == 'source' else ''}"
        )
    return lambda line, where: (line,)


def _tsv_parser(path: Path, fields: tuple[str, ...], options: dict[str, Any]) -> LineParser:
    columns = options.get("columns", list(range(1, len(fields) + 1)))
    valid = isinstance(columns, list) and all(isinstance(column, int) and column >= 1 for column in columns)
    if not valid or len(columns) != len(fields):
        raise ConfigError(f"{path}: columns: {len(fields)} column numbers from 1 are needed ({', '.join(fields)})")

    def parse(line: str, where: str) -> Example:
        cells = line.split("\t")
        if len(cells) < max(columns):
            raise DataError(
                f"{where}: {len(cells)} tab-separated column(s), but {max(columns)} are needed ({', '.join(fields)})"
            )
        return tuple(cells[column - 1] for column in columns)

    return parse


def _jsonl_parser(path: Path, fields: tuple[str, ...], options: dict[str, Any]) -> LineParser:
    keys = _keys(fields, options)

    def parse(line: str, where: str) -> Example:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON object: {error}") from None
        return _record(values, fields, keys, where)

    return parse


_PARSERS = {".txt": _plain_parser, ".tsv": _tsv_parser, ".jsonl": _jsonl_parser}


def _parsed(path: Path, parse: LineParser, header: bool) -> Iterator[Attempt]:
    for number, raw in raw_lines(path):
        if header and number == 1:
            continue
        try:
            yield parse(decode_line(strip_end(raw), path, number), f"{path}:{number}")
        except DataError as error:
            yield error


def _record(values: Any, fields: tuple[str, ...], keys: list[str] | None, where: str) -> Example:
    if not isinstance(values, dict):
        raise DataError(f"{where}: an object with {_expected(fields)} is needed, found {type(values).__name__}")
    texts = []
    for index, field in enumerate(fields):
        names = (keys[index],) if keys else _KEYS[field]
        name = next((name for name in names if name in values), None)
        if name is None:
            hint = nearest(names[0], [str(key) for key in values])
            raise DataError(f'{where}: the key "{names[0]}" is missing{hint}')
        value = values[name]
        if field == "label" and isinstance(value, int):
            value = str(int(value))
        if not isinstance(value, str):
            raise DataError(f'{where}: the key "{name}" must hold text, found {type(value).__name__}')
        texts.append(value)
    return tuple(texts)


def _expected(fields: tuple[str, ...]) -> str:
    return " and ".join(f'"{field}"' for field in fields)


def _keys(fields: tuple[str, ...], options: dict[str, Any]) -> list[str] | None:
    keys = options.get("keys")
    if keys is not None and (not isinstance(keys, list) or len(keys) != len(fields)):
        raise ConfigError(f"keys: a list of {len(fields)} names is needed ({', '.join(fields)})")
    return cast("list[str] | None", keys)


def _parquet(path: Path, fields: tuple[str, ...], options: dict[str, Any]) -> Iterator[Attempt]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading .parquet needs the package pyarrow: pip install pyarrow") from None
    keys = _keys(fields, options)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for rows in table.iter_batches(batch_size=4096):
                for values in rows.to_pylist():
                    number += 1
                    try:
                        yield _record(values, fields, keys, f"{path}: row {number}")
                    except DataError as error:
                        yield error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None
    if number == 0:
        raise DataError(f"{path}: the file is empty")


def _check_options(source: Source) -> None:
    for name in source.options:
        if name not in OPTIONS:
            raise ConfigError(f'{source_files(source)[0]}: unknown option "{name}"{nearest(name, OPTIONS)}')


def read_attempts(source: Source, task: str) -> Iterator[Attempt]:
    """Streams what each line gives: an example, or the `DataError` that says why it gives none. See `read_records`."""
    _check_options(source)
    fields = FIELDS[task]
    for path in source_files(source):
        check_file(path)
    if source.source is not None and source.target is not None:
        if len(fields) != 2:
            raise ConfigError(f"source and target files give pairs, but {task} needs {_expected(fields)}: use path")
        yield from _aligned(Path(source.source), Path(source.target))
        return
    path = source_files(source)[0]
    kind = file_format(path)
    if kind == ".parquet":
        yield from _parquet(path, fields, source.options)
    else:
        parse = _PARSERS[kind](path, fields, source.options)
        yield from _parsed(path, parse, bool(source.options.get("header", False)))


def read_records(source: Source, task: str) -> Iterator[Example]:
    """Streams the examples of a source of files.

    Args:
        source: with `path`, or `source` and `target`. `options` may hold `columns` (numbers from 1) and `header` for
            .tsv, `keys` for .jsonl and .parquet.
        task: a key of `FIELDS`.

    Raises:
        DataError: missing or empty file, unequal sides, invalid UTF-8, malformed record; it names file and line.
    """
    for attempt in read_attempts(source, task):
        if isinstance(attempt, DataError):
            raise attempt
        yield attempt


def read_documents(source: Source, task: str, documents: str) -> Iterator[tuple[str, bool]]:
    """Streams documents as (piece of text, whether the document ends here), for language models.

    `documents` cuts plain text: "line" (each line is a document, without its line end), "blank" (documents are
    separated by empty lines), "file" (the whole file with its line ends is one document). Records are one document
    each.
    """
    path = source_files(source)[0] if source_files(source) else None
    if documents not in DOCUMENTS:
        raise ConfigError(f'unknown value "{documents}" of the option documents{nearest(documents, DOCUMENTS)}')
    if path is None or documents == "line" or file_format(path) != ".txt" or source.source is not None:
        for (text,) in read_records(source, task):
            yield text, True
        return
    _check_options(source)
    if documents == "file":
        for number, raw in raw_lines(path):
            yield decode_line(raw, path, number), False
        yield "", True
        return
    pending = False
    for _, line in text_lines(path):
        if line:
            yield ("\n" if pending else "") + line, False
            pending = True
        elif pending:
            yield "", True
            pending = False
    if pending:
        yield "", True


def example_of(item: object, task: str, where: str) -> Example:
    """One item of a Python iterable as an example: a str, a tuple or list of str, or a dict with the field names."""
    fields = FIELDS[task]
    if isinstance(item, str) and len(fields) == 1:
        return (item,)
    if isinstance(item, dict):
        return _record(item, fields, None, where)
    if isinstance(item, (tuple, list)) and len(item) == len(fields):
        return _record(dict(zip(fields, item, strict=True)), fields, None, where)
    raise DataError(f"{where}: {task} needs {_expected(fields)}, found {type(item).__name__}: {str(item)[:60]!r}")
