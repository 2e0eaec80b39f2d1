"""Named choices: presets, operators, data sources. A wrong name is answered with the right ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from growkit.errors import ConfigError

T = TypeVar("T")


def closest(name: str, allowed: Iterable[str]) -> str:
    """``"did you mean 'x'? Allowed: ..."`` for an error's mend."""
    names = sorted(allowed)
    low = name.lower()
    near = [other for other in names if other.lower().startswith(low)] if low else []
    near = near or difflib.get_close_matches(low, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


class Registry(Generic[T]):
    """A mapping from a name in a recipe to the thing it names."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: registers a thing under ``name``; a second registration is a programming error."""

        def add(item: T) -> T:
            assert name not in self._items, f"{self.kind} {name!r} is registered twice"
            self._items[name] = item
            return item

        return add

    def get(self, name: str, *, key: str) -> T:
        """The thing named ``name``; ``key`` is the recipe key to blame. Raises ConfigError."""
        if name not in self._items:
            raise ConfigError(
                "unknown-choice", f"is not a known {self.kind}", key=key, value=name, mend=closest(name, self._items)
            )
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def items(self) -> Iterable[tuple[str, T]]:
        return self._items.items()
