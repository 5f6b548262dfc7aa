"""Nested settings as users write them: YAML that remembers its lines, and `section.key=value` overrides.

The YAML is read as version 1.2 means it: only true and false are booleans (`off` and the language `no` are words), 1e-3
is a number, dates are text, and a key given twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trilemma.errors import ConfigError

# A mixer is a name, or a mapping with "name" and the mixer's own options; what an override of an option alone refers
# to.
DEFAULT_MIXERS = {"mixer": "attention", "cross_mixer": "cross_attention"}

_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_RESOLVERS = {
    "bool": (re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "null": (re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "merge": (re.compile(r"<<$"), ["<"]),
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars; every key once."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as yaml declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                problem = f'the key "{key_node.value}" is given twice, first on line {seen[key_node.value]}'
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read back as text."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text with breaks that plain and single-quoted scalars fold away is written with escapes."""
    style = '"' if re.search("[\r\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)
for _name, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def yaml_text(values: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to equal values; keys keep their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def yaml_value(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file; `ConfigError` names file and line."""
    file = Path(path)
    text = _text(file)
    try:
        value = yaml_value(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if value is None:
        raise ConfigError(f"{file}: the file is empty")
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: a mapping of sections is needed, found {type(value).__name__}")
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}:{line}: not valid UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None


class Origin:
    """Where a setting came from: an override, or a line of a file."""

    def __init__(self, path: str | Path, overrides: list[str]) -> None:
        self.path = Path(path)
        self.overrides = overrides

    def of(self, location: list[str | int]) -> str:
        """`override "a.b=1"`, `file:line`, or the file alone for what it does not hold."""
        parts = [str(part) for part in location]
        for override in reversed(self.overrides):
            key = override.partition("=")[0].split(".")
            shared = min(len(parts), len(key))  # the mistake may lie in what the override names, or above it
            if parts[:shared] == key[:shared]:
                return f'override "{override}"'
        node = yaml.compose(_text(self.path), Loader=_Loader)
        line = None
        for part in parts:
            found = _step(node, part)
            if found is None:
                break
            line, node = found
        return str(self.path) if line is None else f"{self.path}:{line}"


def _step(node: yaml.Node | None, part: str) -> tuple[int, yaml.Node] | None:
    """Line and value of a mapping's key or a sequence's item."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
        item = node.value[int(part)]
        return item.start_mark.line + 1, item
    return None


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of `values` with each `section.key=value` set; the value is read as YAML."""
    result: dict[str, Any] = copied(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f'override "{override}": write section.key=value')
        try:
            value = yaml_value(text)
        except yaml.YAMLError:
            raise ConfigError(f'override "{override}": the value is not valid YAML') from None
        set_key(result, key, value)
    return result


def set_key(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `a.b.c` in nested mappings and lists (`candidates.0.name`), in place.

    Raises:
        ConfigError: the path leads through something that holds no keys, or beyond a list's end.
    """
    *parents, last = dotted.split(".")
    if not all([*parents, last]):
        _refuse(dotted, "a part of the name is empty")
    node: Any = values
    is_mixer = False
    for depth, parent in enumerate(parents):
        here = ".".join(parents[: depth + 1])
        is_mixer = parent in DEFAULT_MIXERS or parent == "encoder_mixer" or (is_mixer and isinstance(node, list))
        child = node[_index(node, parent, dotted)] if isinstance(node, list) else node.get(parent)
        if is_mixer and not isinstance(child, (dict, list)):
            child = {"name": _mixer_name(parent, child, dotted)}
        elif child is None:
            child = {}
        elif not isinstance(child, (dict, list)):
            _refuse(dotted, f"{here} holds {child!r}, it is no section")
        if isinstance(node, list):
            node[_index(node, parent, dotted)] = child
        else:
            node[parent] = child
        node = child
    if isinstance(node, list):
        node[_index(node, last, dotted)] = value
    else:
        node[last] = value


def _mixer_name(key: str, child: Any, dotted: str) -> str:
    """The mixer whose option is set: the one named, or the default."""
    name = DEFAULT_MIXERS.get(key) if child is None else child
    if not isinstance(name, str):
        _refuse(dotted, f"{key} names no mixer yet; set it first: {key}={{name: ...}}")
    return name


def _index(items: list[Any], part: str, dotted: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        _refuse(dotted, f'a list of {len(items)} stands here; "{part}" is no index from 0 to {len(items) - 1}')
    return int(part)


def _refuse(dotted: str, problem: str) -> NoReturn:
    raise ConfigError(f'cannot set "{dotted}": {problem}')


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; dotted keys in `changes` are allowed. A mixer given as a mapping replaces the old one."""
    result: dict[str, Any] = copied(base)
    for key, value in changes.items():
        if "." in key:
            set_key(result, key, copied(value))
        elif isinstance(value, dict) and isinstance(result.get(key), dict) and not key.endswith("mixer"):
            result[key] = merge(result[key], value)
        else:
            result[key] = copied(value)
    return result


def copied(value: Any) -> Any:
    """Mappings and lists copied all the way down."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value
