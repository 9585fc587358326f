"""A registry: entries by name, which every other part of the package looks up, and which a program may add to.

It imports nothing of the package, so that the configuration can be checked without loading torch. What an entry needs of
higher floors stands in it as the text "module:name", and is imported when it is first asked for.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

Reference = str | Any  # "package.module:name", "package.module", or the object itself


class Entry(Protocol):
    """What can be registered."""

    @property
    def name(self) -> str:
        """What a configuration says."""
        ...

    @property
    def said(self) -> str:
        """What the list of the configuration's keys says of it."""
        ...


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """Entries by name, in the order in which they were added."""

    def __init__(self, *entries: E) -> None:
        self._entries: dict[str, E] = {}
        for entry in entries:
            self.register(entry)

    def register(self, entry: E) -> None:
        """Add an entry. Raises ValueError: there is one of that name."""
        if entry.name in self._entries:
            raise ValueError(f"'{entry.name}' is registered already")
        self._entries[entry.name] = entry

    def unregister(self, name: str) -> None:
        """Take an entry out. Raises KeyError: there is none of that name."""
        del self._entries[name]

    @contextlib.contextmanager
    def registered(self, *entries: E) -> Iterator[None]:
        """Add entries for as long as the block runs."""
        with contextlib.ExitStack() as held:
            for entry in entries:
                self.register(entry)
                held.callback(self.unregister, entry.name)
            yield

    def listed(self, say: Callable[[E], str] = lambda entry: f"'{entry.name}'", last: str = "or") -> str:
        """Return what is said of all entries as part of a sentence: a, b or c."""
        *others, final = map(say, self._entries.values())
        return f" {last} ".join([*filter(None, [", ".join(others)]), final])

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load(reference: Reference) -> Any:
    """Return what a reference names, importing its module where that is still to be done."""
    if not isinstance(reference, str):
        return reference
    name, _, attribute = reference.partition(":")
    module = importlib.import_module(name)
    return getattr(module, attribute) if attribute else module
