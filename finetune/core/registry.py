"""The registry behind every extension point: the classes that our packages define and other packages add.

To add a family, method, objective, optimiser or export format, add one file to its package: `Registry` finds it. A
package outside finetune adds its own classes with an entry point of the same group, or with `register`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from finetune.core.errors import BadInput

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """A mapping from names to classes, sorted by name. The modules are imported at the first access."""

    def __init__(self, base: Any, package: str, name_of: Callable[[Any], str], nested: bool = False) -> None:
        """
        Args:
            base: the abstract class that entries derive from.
            package: the package with our own entries; also the name of the entry point group.
            name_of: returns the name that recipes use for a class.
            nested: also search the packages inside `package`.
        """
        self.base, self.package, self.name_of, self.nested = base, package, name_of, nested
        self._found: dict[str, type[T]] = {}
        self._loaded = self._loading = False

    def register(self, entry: type[T]) -> type[T]:
        """Adds a class and returns it, so that it can be used as a decorator.

        Raises:
            BadInput: it is not a concrete subclass of `base`, or another class already has its name.
        """
        if not (inspect.isclass(entry) and issubclass(entry, self.base) and not inspect.isabstract(entry)):
            raise BadInput(f"{entry!r} can't be added to {self.package}: it must be a {self.base.__name__} class")
        name = self.name_of(entry)
        there = self._found.get(name)
        if there is not None and there is not entry:
            raise BadInput(
                f"{self.package} has two {name!r}, in {there.__module__} and in {entry.__module__}: rename one"
            )
        self._found[name] = entry
        return entry

    def __getitem__(self, name: str) -> type[T]:
        self._load()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._found))

    def __len__(self) -> int:
        self._load()
        return len(self._found)

    def _load(self) -> None:
        """Imports our own modules, then entry points. If that fails, the next access tries again."""
        if self._loaded or self._loading:
            return
        self._loading = True
        try:
            for module in self._modules():
                for item in list(vars(module).values()):
                    if inspect.isclass(item) and self._is_ours(item, module.__name__):
                        self.register(cast(type[T], item))
            for entry in entry_points(group=self.package):
                self.register(self._from_outside(entry))
            self._loaded = True
        finally:
            self._loading = False

    def _from_outside(self, entry: EntryPoint) -> type[T]:
        try:
            found: type[T] = entry.load()
            return found
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist else "a package"
            raise BadInput(
                f"{entry.value} of {package} can't be loaded into {self.package} ({error}): update that package, or "
                "uninstall it"
            ) from error

    def _modules(self) -> Iterator[Any]:
        package = importlib.import_module(self.package)
        found = pkgutil.walk_packages if self.nested else pkgutil.iter_modules
        for module in found(package.__path__, f"{self.package}."):
            yield importlib.import_module(module.name)

    def _is_ours(self, item: Any, module: str) -> bool:
        """Whether the class is an entry that this module defines, not one that it imports."""
        return item.__module__ == module and issubclass(item, self.base) and not inspect.isabstract(item)
