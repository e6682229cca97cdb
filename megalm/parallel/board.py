"""A notice board over the launch's key-value store, for a thread that must not be held up.

The store's client is one connection with a lock: whoever waits for a key keeps others out, so the board has a client of
its own. And the host that holds the store may vanish without closing the connection, where a call would never return:
each one is made in a thread that is left behind if it does not come back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

T = TypeVar("T")
PATIENCE = 5.0
"""Seconds that a call to the store may take."""


class BoardGone(Exception):
    """The store does not answer."""


class Board:
    """JSON notices of all ranks. Every method raises :class:`BoardGone` once the store has failed to answer."""

    def __init__(self, store: Store, topic: str) -> None:
        self._gone = False
        self._store = self._ask(lambda: PrefixStore(topic, store.clone()))  # type: ignore[attr-defined]

    def post(self, key: str, value: Any) -> None:
        """Put a notice up."""
        self._ask(lambda: self._store.set(key, json.dumps(value)))

    def read(self, key: str) -> Any | None:
        """A notice, or none where there is none yet; does not wait for it."""
        return self._ask(lambda: json.loads(self._store.get(key)) if self._store.check([key]) else None)

    def first(self, key: str) -> bool:
        """Whether nobody has asked this before."""
        return self._ask(lambda: self._store.add(key, 1) == 1)

    def _ask(self, call: Callable[[], T]) -> T:
        if self._gone:
            raise BoardGone
        try:
            return within(PATIENCE, call)
        except (RuntimeError, TimeoutError) as error:
            self._gone = True
            raise BoardGone from error


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, made in another thread; TimeoutError where that takes longer."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
