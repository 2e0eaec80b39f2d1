"""Writes docs/cli-reference.md: every command of ``growkit``, from the functions that declare it.

    python scripts/make_cli_reference.py

It says what ``--help`` says, without a terminal's width and colours. tests/test_docs.py fails if the file is
not up to date.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.cli.main import app  # noqa: E402

OUTPUT = ROOT / "docs" / "cli-reference.md"
WORDS = {str: "text", int: "whole number", float: "number", bool: "flag", Path: "path"}

HEAD = """\
# Command reference

Every command of `growkit`. Written by `scripts/make_cli_reference.py` from the code; do not edit it by hand.

`growkit --help` and `growkit COMMAND --help` (or `-h`) say the same in a terminal. `growkit --version` shows the
version; `growkit --install-completion` lets the shell complete commands and options. Options stand anywhere behind the
command.

Exit codes: 0 done, 2 a mistake in the input ([errors](errors.md)), 3 stopped early and resumable.
"""


@dataclass(frozen=True)
class Parameter:
    """One argument or option as it is declared."""

    name: str
    kind: Any  # the annotated type without ``| None`` and ``list[...]``
    many: bool
    info: Any  # typer's ArgumentInfo or OptionInfo
    default: Any  # inspect.Parameter.empty where it must be given

    @property
    def is_option(self) -> bool:
        return any("Option" in base.__name__ for base in type(self.info).__mro__)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def spelling(self) -> str:
        """``RECIPE`` or ``-o, --output``, as it is written on a command line."""
        if not self.is_option:
            return str(self.info.metavar or self.name.upper())
        # Inside Annotated, typer takes the first spelling for a default until it builds the command.
        names = [name for name in (self.info.default, *(self.info.param_decls or ())) if isinstance(name, str)]
        flag = f"--{self.name.replace('_', '-')}"
        return ", ".join(names) or (f"{flag}, --no-{flag[2:]}" if self.kind is bool else flag)

    @property
    def in_usage(self) -> str:
        if self.is_option:
            return f"{self.spelling.split(', ')[-1]} {self.name.upper()}"
        word = self.spelling if self.required else f"[{self.spelling}]"
        return f"{word}..." if self.many else word

    @property
    def type(self) -> str:
        if isinstance(self.kind, type) and issubclass(self.kind, enum.Enum):
            word = " \\| ".join(f"`{member.value}`" for member in self.kind)
        elif typing.get_origin(self.kind) is typing.Literal:
            word = " \\| ".join(f"`{choice}`" for choice in typing.get_args(self.kind))
        else:
            word = WORDS[self.kind]
        limits = [
            f"{sign} {limit}" for sign, limit in (("≥", self.info.min), ("≤", self.info.max)) if limit is not None
        ]
        return ", ".join((f"{word}, several" if self.many else word, *limits))

    @property
    def default_text(self) -> str:
        if self.required:
            return "must be given"
        if self.default is None or self.default == [] or self.default is False:
            return "–"
        value = getattr(self.default, "value", self.default)
        return f"`{value!r}`" if isinstance(value, str) and value != value.strip() else f"`{value}`"


def parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, declared in inspect.signature(function).parameters.items():
        annotated = typing.get_args(hints[name])
        if len(annotated) != 2:
            continue  # typer's own context
        kind, info = annotated
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(member for member in typing.get_args(kind) if member is not type(None))
        many = typing.get_origin(kind) is list
        yield Parameter(name, typing.get_args(kind)[0] if many else kind, many, info, declared.default)


def commands(group: typer.Typer, path: str) -> Iterator[tuple[str, Any]]:
    """(``growkit recipes list``, what was registered), in the order of ``--help``."""
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{path} {command.name or command.callback.__name__.replace('_', '-')}", command
    for sub in group.registered_groups:
        assert sub.typer_instance is not None and isinstance(sub.name, str)
        yield from commands(sub.typer_instance, f"{path} {sub.name}")


def section(path: str, command: Any) -> str:
    declared = list(parameters(command.callback))
    options = [parameter for parameter in declared if parameter.is_option]
    usage = [path, *(p.in_usage for p in declared if not p.is_option), *(p.in_usage for p in options if p.required)]
    if any(not option.required for option in options):
        usage.append("[OPTIONS]")
    parts = [f"## {path}", inspect.cleandoc(command.help or command.callback.__doc__), f"`{' '.join(usage)}`"]
    if declared:
        rows = ["| argument or option | type | default | what it is |", "|---|---|---|---|"]
        for p in declared:
            assert p.info.help, f"{path} {p.spelling} has no help"
            line = p.info.help.replace("|", "\\|")
            rows.append(f"| `{p.spelling}` | {p.type} | {p.default_text} | {line} |")
        parts.append("\n".join(rows))
    if examples := re.findall(r"Example: (.+)", command.epilog or ""):
        parts.append("```bash\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts) + "\n"


def render() -> str:
    return "\n".join((HEAD, *(section(path, command) for path, command in commands(app, "growkit"))))


def main() -> None:
    OUTPUT.write_text(render(), encoding="utf-8")
    print(f"wrote {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
