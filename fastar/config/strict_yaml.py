"""Strict YAML: plain values alone, no key twice, and an end to depth and size. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from fastar.errors import FastarError
from fastar.runtime.json_files import LARGEST

DEEPEST = 50
MOST = 100_000
TEXT = 10_000_000
"""Limits of settings: levels, values (each alias counts as what it stands for), and characters of a file."""

_PLAIN = {f"tag:yaml.org,2002:{name}": name for name in ("null", "bool", "int", "float", "str")}


# libyaml's parser, six times faster than PyYAML's own; None: PyYAML was built without.
_C_PARSER: Any = getattr(getattr(yaml, "cyaml", None), "CParser", None)
# Characters of which both make the same, where libyaml reads a text at all: no tabs, no ? ! | >.
_ALIKE = re.compile(r"[ \"-$&-=@-{}~\n]*")


class _StrictLoader(yaml.SafeLoader):
    """Plain values alone, no key twice, and an end to depth and number."""

    deep, many = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.deep += 1
        self._bounded(self.peek_event(), self.deep)
        node = super().compose_node(parent, index)
        self.deep -= 1
        return node

    def plain(self, node: yaml.Node, deep: int = 1) -> Any:
        """The value of `node`. An alias is a value of its own, so that none of them is met again inside itself."""
        self.many += 1
        self._bounded(node, deep)
        if node.tag == "tag:yaml.org,2002:seq" and isinstance(node, yaml.SequenceNode):
            return [self.plain(one, deep + 1) for one in node.value]
        if node.tag == "tag:yaml.org,2002:map" and isinstance(node, yaml.MappingNode):
            return self._mapping(node, deep)
        if node.tag == "tag:yaml.org,2002:timestamp":  # to no setting a date, and a run may be called by one
            return node.value
        if node.tag not in _PLAIN or not isinstance(node, yaml.ScalarNode):
            raise _refused(node, f"{node.tag.replace('tag:yaml.org,2002:', '!!')} is no type that settings have")
        try:
            value = self.construct_object(node)
        except (ValueError, LookupError, OverflowError) as error:  # 0x_, !!bool x, more digits than Python reads
            raise _refused(node, f"{shortened(node.value)!r} is no {_PLAIN[node.tag]}") from error
        if isinstance(value, int) and abs(value) > LARGEST:
            raise _refused(node, f"{shortened(node.value)} is too large a number")
        if isinstance(value, str) and "\0" in value:  # no name has it
            raise _refused(node, "a NUL character")
        return value

    def _mapping(self, node: yaml.MappingNode, deep: int) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        under: dict[Any, Any] = {}
        for name, content in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                merged = self.plain(content, deep + 1)
                for one in merged if isinstance(merged, list) else [merged]:
                    if not isinstance(one, dict):
                        raise _refused(name, "<< needs a mapping")
                    under = {**one, **under}
                continue
            key = self.plain(name, deep + 1)
            if not isinstance(key, Hashable):
                raise _refused(name, "a key must be a plain value")
            if key in own:
                raise _refused(name, f"{shortened(str(key))} is given twice; leave one out")
            own[key] = self.plain(content, deep + 1)
        return {**under, **own}

    def _bounded(self, at: yaml.Node | yaml.Event, deep: int) -> None:
        if deep > DEEPEST:
            raise _refused(at, f"nested more than {DEEPEST} levels deep")
        if self.many > MOST:
            raise _refused(at, f"more than {MOST:,} values")


class _StrictCLoader(_StrictLoader):
    """The same, of what libyaml's parser reads."""

    def __init__(self, text: str):
        super().__init__("")
        parser = _C_PARSER(text)
        for name in ("check_event", "peek_event", "get_event"):
            setattr(self, name, getattr(parser, name))


def _refused(at: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def read_yaml(text: str) -> Any:
    """The settings in `text`: null, booleans, numbers and strings (a date is one), in lists and
    mappings that have no key twice.

    Raises:
        FastarError: anything else; the message says the line and what is wrong there, not where `text` is from.
    """
    if _C_PARSER is not None and _ALIKE.fullmatch(text):
        try:
            return _value(_StrictCLoader(text))
        except yaml.YAMLError:
            pass  # PyYAML's own parser says what is wrong
    try:
        return _value(_StrictLoader(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise FastarError(f"{line}{' '.join(filter(None, (error.context, error.problem)))}") from error
    except yaml.YAMLError as error:
        raise FastarError(" ".join(str(error).split())) from error


def _value(loader: _StrictLoader) -> Any:
    node = loader.get_single_node()
    return None if node is None else loader.plain(node)


def shortened(text: str) -> str:
    """A text, cut to what fits on a line."""
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text):,} characters)"
