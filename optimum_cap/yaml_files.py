"""Reading YAML files of settings."""

import re
from pathlib import Path
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does, and refuses duplicate keys.

    YAML 1.1, which PyYAML reads, takes `2:4` as the number 124 and `1e-4` as text.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # before merges
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(node.value)
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)


# See the core schema in https://yaml.org/spec/1.2.2/#103-core-schema.
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


# Raised by PyYAML for values that do not fit their tags, and for too many levels.
_OTHER_ERRORS = (ValueError, LookupError, AttributeError, RecursionError)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
        path: The file.
        what: Kind of file for error messages, such as `"study file"`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is a folder, not valid YAML, or not a mapping.
    """
    if path.is_dir():
        raise ValueError(f"the {what} {path} is a folder: name a file")
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} does not exist: check its path")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, *_OTHER_ERRORS) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise ValueError(f"{path} must be a YAML mapping, got {found}: write lines `name: value`")
    return values
