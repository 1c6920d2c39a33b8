"""Turning what a user wrote, in YAML or in flags, into the typed fields of a dataclass.

A wrong key or value is refused here with one sentence; silently ignoring it would train a wrong model.
"""

import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from slothcore.training.other_names import OTHER_NAMES, OTHER_VALUES, REMARKS, VALUE_REMARKS, has_no_counterpart

Config = TypeVar("Config")

WORDS_FOR_NONE = {"none", "null", "~"}
# How alike, from 0 to 1, two names are spelled of which one may be meant by the other.
CLOSE = 0.7
DEVICE = re.compile(r"(cpu|cuda)(:\d+)?")
WORDS_FOR_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def option(default: Any, text: str, *, group: str, shown: bool = True) -> Any:
    """A dataclass field that carries its own help text and the group under which `--help` lists it.

    Args:
        shown: whether `repr` shows the value; a secret's must not be.
    """
    return field(default=default, metadata={"help": text, "group": group}, repr=shown)


def check_names(
    given: Iterable[str], known: Iterable[str], *, source: str, others: Mapping[str, str] = OTHER_NAMES
) -> None:
    """Raise ValueError for the names in `given` that are not in `known`, saying of each which one is meant.

    Args:
        others: names that other programs have, and which one here is meant by each.
    """
    known = list(known)
    unknown = [str(name) for name in given if name not in known]
    if not unknown:
        return
    meant = {name: others[name] for name in unknown if others.get(name) in known}
    absent = [name for name in unknown if name not in meant and has_no_counterpart(name)]
    rest = [name for name in unknown if name not in meant and name not in absent]
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=CLOSE) for name in rest}
    if len(unknown) == 1:
        [name] = unknown
        if absent:
            hint = "slothcore has nothing like it: leave it out"
        else:
            found = near.get(name) or ([meant[name]] if meant else [])
            hint = f"did you mean {found[0]!r}?" if found else "--help lists the options"
        raise ValueError(f"unknown option {name!r} in {source}; {hint}{_remark(name, meant.get(name))}")
    # A file of another library has twenty of them, and is not to be mended in twenty rounds.
    hints = []
    if meant:
        hints.append("here " + ", ".join(f"{name} is {here}{_remark(name, here)}" for name, here in meant.items()))
    if rest:
        words = (f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in rest)
        hints.append(f"nothing is known of {', '.join(words)}: --help lists the options")
    if absent:
        hints.append(
            f"slothcore has nothing like {', '.join(f'{name}{_remark(name, None)}' for name in absent)}: leave that out"
        )
    raise ValueError(f"unknown options in {source}: {'; '.join(hints)}")


def _remark(name: str, here: str | None) -> str:
    """What else has to be said of an option of another library that is called `here`; None: that has no counterpart.

    Of another meaning, as of export's push_to_hub, nothing has.
    """
    is_meant = name in REMARKS and OTHER_NAMES.get(name) == here
    # In the tables of the guides it is code.
    return f" ({REMARKS[name].replace('`', '')})" if is_meant else ""


def strict_names(config: type[Config]) -> type[Config]:
    """Have a class of options refuse a name that it lacks as files and flags do, and not with Python's TypeError."""
    make = config.__init__

    @functools.wraps(make)
    def init(self: Config, **values: Any) -> None:
        check_names(values, config.__dataclass_fields__, source=config.__name__)  # type: ignore[attr-defined]
        make(self, **values)

    config.__init__ = init  # type: ignore[method-assign, assignment]
    return config


def check_device_name(name: str) -> None:
    """Raise ValueError unless this is what a CPU or a GPU is called, whether there is one or not."""
    if DEVICE.fullmatch(name) is None:
        raise ValueError(f"device {name!r} does not exist; use 'cpu' or 'cuda'")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of option names to values in a YAML file; only plain data is read, never objects.

    Raises: FileNotFoundError, or ValueError if the file is not YAML or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the configuration file {path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8, but has byte {error.object[error.start]:#04x} in it; save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        # What yaml calls a text that it was given.
        reason = " ".join(str(error).split()).replace(' in "<unicode string>",', " in")
        raise ValueError(f"{path} is not valid YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping of option names to values, got a {type(content).__name__}")
    return dict(content)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain data only, as SafeLoader reads it, but a key that stands twice is an error; yaml keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(problem=f"{key.value} stands twice, again in line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def coerce(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the type that `annotation` asks for; text such as "1e-4" or "true" is read as that type.

    Supports str, int, float, bool, None, Literal, tuples of one type, Mapping[str, Any] and unions of these.

    Raises: ValueError naming the option, what it must be and what it is.
    """
    if isinstance(value, str):
        value = OTHER_VALUES.get(name, {}).get(value, value)
    for member in _members(annotation):
        accepted, result = _convert(value, member)
        if accepted:
            return result
    remark = f"; {VALUE_REMARKS[name]}" if name in VALUE_REMARKS else ""
    raise ValueError(f"{name} must be {describe(annotation)}, got {value!r}{remark}")


def describe(annotation: Any) -> str:
    """What a user may write for a field of this type, in words."""
    members = sorted(_members(annotation), key=lambda member: member is types.NoneType)
    words = [_describe_one(member) for member in members]
    choices = [word for member, word in zip(members, words, strict=True) if typing.get_origin(member) is Literal]
    if bool in members and choices:
        # One row of words to choose from, not "a | b or true or false".
        rest = [word for member, word in zip(members, words, strict=True) if member is not bool and word not in choices]
        words = [" | ".join(["true", "false", *choices]), *rest]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def takes_bool(annotation: Any) -> bool:
    """Whether a field of this type may be true or false, so that a flag alone says true."""
    return bool in _members(annotation)


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union, the one for None first, so that "none" is not read as text."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
        return sorted(members, key=lambda member: member is not types.NoneType)
    return [annotation]


def _describe_one(member: Any) -> str:
    if typing.get_origin(member) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(member))
    if typing.get_origin(member) is tuple:
        return "a list of names" if typing.get_args(member)[0] is str else "a list of numbers"
    if typing.get_origin(member) is Mapping:
        return "a mapping"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "null",
    }[member]


def _convert(value: Any, member: Any) -> tuple[bool, Any]:
    """Whether `value` can be read as `member`, and the result."""
    text = value.strip() if isinstance(value, str) else None
    if member is types.NoneType:
        return value is None or (text is not None and text.lower() in WORDS_FOR_NONE), None
    if typing.get_origin(member) is Literal:
        matches = [choice for choice in typing.get_args(member) if choice == value or str(choice) == text]
        # True == 1 in Python, but `bits: true` is a mistake.
        return bool(matches) and not isinstance(value, bool), matches[0] if matches else None
    if typing.get_origin(member) is tuple:
        return _convert_list(value, typing.get_args(member)[0])
    if typing.get_origin(member) is Mapping:
        return _convert_mapping(value, text)
    if member is bool:
        if text is not None and text.lower() in WORDS_FOR_BOOL:
            return True, WORDS_FOR_BOOL[text.lower()]
        return isinstance(value, bool), value
    if member is str:
        # Path is welcome wherever text is: the Python API takes both.
        return isinstance(value, str | Path), str(value)
    if isinstance(value, bool):
        return False, None
    if text is not None:
        # YAML 1.1 reads 1e-4 (no dot) as text; a learning rate is usually written so.
        try:
            return True, member(text)
        except ValueError:
            return False, None
    return isinstance(value, (int, float) if member is float else int), member(value) if _is_number(value) else None


def _convert_list(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` is a list, each of whose items can be read as `kind`, and the result as a tuple."""
    if not isinstance(value, list | tuple):
        return False, None
    items = [_convert(item, kind) if isinstance(item, str) or kind is not str else (False, None) for item in value]
    accepted = all(fits for fits, _ in items)
    return accepted, tuple(item for _, item in items) if accepted else None


def _convert_mapping(value: Any, text: str | None) -> tuple[bool, Any]:
    """Whether `value` is a mapping, or `text` is one as a flag has it, '{"factor": 4}'; and the result."""
    if text is not None and text.startswith("{"):
        try:
            value = yaml.load(text, Loader=_UniqueKeyLoader)
        except yaml.YAMLError:
            return False, None
    is_mapping = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return is_mapping, dict(value) if is_mapping else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
