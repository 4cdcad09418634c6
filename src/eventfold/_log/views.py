"""The views that are registered with a log, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, ValuesView
from typing import Any, TypeVar, overload

from .._errors import UnknownViewError
from .._view import View

S = TypeVar("S")


class Views(Mapping[str, View[Any]]):
    """The views of a log by name. With a `View` object as the key, the result has the type of that view."""

    def __init__(self, views: Mapping[str, View[Any]]) -> None:
        self._views = dict(views)

    def __repr__(self) -> str:
        return f"<Views: {', '.join(self._views) or 'none'}>"

    @overload
    def __getitem__(self, name: View[S]) -> View[S]: ...
    @overload
    def __getitem__(self, name: str) -> View[Any]: ...
    def __getitem__(self, name: str | View[Any]) -> View[Any]:
        """The view. Raises `UnknownViewError`, which is a `KeyError`, if it is not registered."""
        view = self._views.get(name.name if isinstance(name, View) else name)
        if view is None or (isinstance(name, View) and view is not name):
            raise UnknownViewError(name.name if isinstance(name, View) else name, tuple(self._views))
        return view

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def values(self) -> ValuesView[View[Any]]:
        """The views. The method of `Mapping` would look up each of them by name."""
        return self._views.values()


def views_by_name(views: Iterable[View[Any]]) -> dict[str, View[Any]]:
    """The views by name. Raises `TypeError` if they are not all views, `ValueError` if two have the same name."""
    if isinstance(views, View | str | Mapping) or not isinstance(views, Iterable):
        raise TypeError(f"views must be a collection of View objects, such as [View(...)], not {views!r}")
    registered: dict[str, View[Any]] = {}
    for view in views:
        if not isinstance(view, View):
            raise TypeError(f"views must be a collection of View objects, but it contains {view!r}")
        if view.name in registered:
            raise ValueError(f"two views are named {view.name!r}")
        registered[view.name] = view
    return registered
