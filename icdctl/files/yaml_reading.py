"""The only reader of YAML: limited in size, depth and number of values, and one kind of error for all that is wrong.

Apart from `icdctl.files`, because importing the parser takes a fifth of the time of `icdctl --help`.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from icdctl.files.reading import check_value, read_text

LARGEST_YAML_BYTES = 1024**2
"""Largest YAML file that is read: the parser takes about ten seconds for it."""
_DEEPEST = 50
"""Most levels of lists and mappings inside each other; a params.yaml has about five."""
_MOST_NODES = 200_000
"""Most values in a text, which is a params.yaml of about 20,000 lines."""
_MOST_VALUES = 1_000_000
"""Most values with the aliases written out."""


def read_yaml(path: Path, *, most_bytes: int = LARGEST_YAML_BYTES) -> object:
    """The value of a YAML file; None for an empty one.

    Raises:
        OSError: the file is missing, is no regular file, or is too large.
        ValueError: as for `parse_yaml`, or it is not UTF-8.
    """
    return parse_yaml(read_text(path, most_bytes=most_bytes))


def parse_yaml(text: str, *, aliases: bool = True) -> object:
    """The value of a YAML text that may come from anywhere; None for an empty one.

    Args:
        text: one YAML document.
        aliases: whether it may use `*name`.

    Raises:
        ValueError: it is not YAML, is nested too deep or too large, names a key twice, refers to itself, or holds a
            value that its tag does not allow, or that `check_value` refuses.
    """
    try:
        value = _value(text, aliases=aliases)
    except yaml.YAMLError as error:
        raise ValueError(_problem(error)) from error
    except (LookupError, AttributeError, TypeError, RecursionError) as error:
        # Of values that only look like dates, numbers or words of YAML, or that can't be keys.
        raise ValueError("a value is not what its tag says") from error
    check_value(value)
    return value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
    """Composes nodes up to a depth and a number, so that a short text can't keep the parser busy."""

    def __init__(self, text: str, *, aliases: bool) -> None:
        super().__init__(text)
        self._aliases = aliases
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and not self._aliases:
            raise yaml.MarkedYAMLError(problem="it has YAML aliases", problem_mark=event.start_mark)
        self._depth += 1
        self._nodes += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem="it is nested too deep", problem_mark=event.start_mark)
        if self._nodes > _MOST_NODES:
            raise yaml.MarkedYAMLError(problem="there are too many values", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _value(text: str, *, aliases: bool) -> object:
    loader = _Loader(text, aliases=aliases)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, {})
        value: object = loader.construct_document(node)
        return value
    finally:
        loader.dispose()


def _check_nodes(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Refuse keys that appear twice, of which YAML would take the last, and values that contain themselves.

    Args:
        node: the node to check, with all nodes below it.
        known: size and height of the nodes seen so far, by id; size 0 for one that is being checked.

    Returns:
        Number of values, and of levels, both with aliases written out.

    Raises:
        yaml.YAMLError: the node has such a key or value, or is too large.
    """
    if id(node) in known:
        if not known[id(node)][0]:
            raise yaml.MarkedYAMLError(problem="a value refers to itself", problem_mark=node.start_mark)
        return known[id(node)]
    known[id(node)] = (0, 0)
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in keys:
                raise yaml.MarkedYAMLError(problem=f"the key `{key.value}` appears twice", problem_mark=key.start_mark)
            keys.add(name)
            inside += (key, value)
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    below = [_check_nodes(each, known) for each in inside]
    size, height = 1 + sum(size for size, _ in below), 1 + max((height for _, height in below), default=0)
    if size > _MOST_VALUES:
        raise yaml.MarkedYAMLError(problem="there are too many values", problem_mark=node.start_mark)
    if height > _DEEPEST:
        raise yaml.MarkedYAMLError(problem="it is nested too deep", problem_mark=node.start_mark)
    known[id(node)] = (size, height)
    return size, height


def _problem(error: yaml.YAMLError) -> str:
    """The error in one line, with its place if that is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return str(error.problem) + (f", in line {mark.line + 1}" if mark is not None else "")
    return (str(error).splitlines() or [type(error).__name__])[0]
