"""Names for objects of one kind."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Objects by their `name`. Tests run over all that is registered.

    Args:
        what: what the objects are, as messages say it: the name of the argument that takes one.
        kind: their class.
        elsewhere: what other libraries call some of them, for the hint: their words, in small letters, to our names.
    """

    def __init__(self, what: str, kind: type[T], elsewhere: Mapping[str, str] | None = None):
        super().__init__()
        self._what, self._kind, self._elsewhere = what, kind, elsewhere or {}

    def register(self, item: T) -> T:
        """Adds an object under its name.

        Raises:
            ValueError: the name is taken.
        """
        if item.name in self:
            raise ValueError(f"a {self._what} named {item.name!r} is registered already; choose another name")
        self[item.name] = item
        return item

    def find(self, item: str | T) -> T:
        """The object of that name, or the object itself.

        Raises:
            ValueError: nothing has that name; the message has the one that is meant elsewhere, or the nearest one.
            TypeError: neither a name nor an object of the kind.
        """
        if isinstance(item, self._kind):
            return item
        if not isinstance(item, str):
            got = type(item).__name__
            if isinstance(item, type) and issubclass(item, self._kind):
                got = f"the class {item.__name__}: call it, {item.__name__}()"
            raise TypeError(f"{self._what} must be a name or a neuralde {self._what}, got {got}")
        if item not in self:
            word = item.lower()
            near = [self._elsewhere[word]] if word in self._elsewhere else difflib.get_close_matches(word, self, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown {self._what} {item!r}; {hint}Known {self._what}s: {', '.join(self)}")
        return self[item]
