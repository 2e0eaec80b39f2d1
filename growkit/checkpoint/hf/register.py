"""Makes transformers know the model type "growkit" wherever growkit was imported. Standard library only.

``import growkit`` must not load transformers, and transformers may be imported before growkit or after it. So: if
transformers' table of configurations is there already, the type is entered at once; if not, a finder waits for that
table's module, enters the type when it has been loaded, and goes away.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Now, or as soon as transformers' Auto classes are imported."""
    if TABLE in sys.modules:
        _enter(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, _Waiting())


def _enter(table: ModuleType) -> None:
    from growkit.checkpoint.hf.config import GrowkitConfig
    from growkit.checkpoint.hf.format import MODEL_TYPE

    table.AutoConfig.register(MODEL_TYPE, GrowkitConfig, exist_ok=True)


class _Waiting(MetaPathFinder):
    """Finds the table as the other finders do, and has its loader report."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Reporting(spec.loader, self)
                return spec
        return None


class _Reporting(Loader):
    """Another loader, and the registration behind it."""

    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # the module looks as if nobody had waited for it
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.waiting in sys.meta_path:
            sys.meta_path.remove(self.waiting)
        _enter(module)
