"""Docstrings as the site's reference reads them: roles are links, each argument has an entry."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")
ARGS = re.compile(r"^(?:Args|Attributes):\n(?:(?: .*)?(?:\n|\Z))+", re.M)
# Several names before one description, over several lines too.
GROUP = re.compile(
    r"^(?P<indent> +)(?P<names>(?:\*{0,2}\w+,\s+)+\*{0,2}\w+)(?P<text>:.*(?:\n(?P=indent) +.*)*)",
    re.M,
)


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            name = match["name"]
            shown = name.rpartition(".")[2] if match["short"] else name.removeprefix(".")
            return (
                f'<autoref optional identifier="{_full(name, obj)}"><code>{shown}</code></autoref>'
            )

        text = ARGS.sub(lambda args: GROUP.sub(_each, args[0]), obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)  # the section griffe knows
        text = re.sub(r"::(?=\n\n +\S)", ":", text)  # before a literal block
        obj.docstring.value = ROLE.sub(link, text)


def _each(group: re.Match[str]) -> str:
    names = re.split(r",\s+", group["names"])
    return "\n".join(f"{group['indent']}{name}{group['text']}" for name in names)


def _full(name: str, obj: griffe.Object) -> str:
    """The dotted path of a name, as it is read where the docstring stands."""
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name
