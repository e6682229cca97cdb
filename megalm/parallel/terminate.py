"""A say for the process before a C++ exception in a foreign thread ends it.

Where ranks disagree on the size of a message, gloo throws in its own thread, where nobody catches; NCCL's watchdog does
the like. C++ then calls the terminate handler, which aborts the process without a word of what it was doing, and a
launcher ends the other ranks before they can say anything. The handler can be replaced from here, through C++'s own
function for that; it runs as an ordinary call in the thread that threw.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

_LIBRARIES = (None, "libstdc++.so.6", "libc++abi.dylib")
_SET_TERMINATE = "_ZSt13set_terminatePFvvE"
_Handler = ctypes.CFUNCTYPE(None)


class TerminateHandler:
    """Calls ``notify`` when the process would be aborted; that thread stops for good, and someone must end the process.

    Does nothing where C++'s library cannot be found.
    """

    def __init__(self, notify: Callable[[], object]) -> None:
        def terminated() -> None:
            try:
                notify()
                time.sleep(60)
            finally:
                os.abort()  # nobody has ended the process: this must not return

        self._handler = _Handler(terminated)  # kept alive as long as C++ may call it
        self._previous: object = None

    def install(self) -> None:
        """Take the place of the handler that is there."""
        self._previous = _set_terminate(self._handler)

    def remove(self) -> None:
        """Put the former one back."""
        if self._previous is not None:
            _set_terminate(self._previous)


def _set_terminate(handler: object) -> object:
    for name in _LIBRARIES:
        try:
            function = getattr(ctypes.CDLL(name), _SET_TERMINATE)
        except (OSError, AttributeError):
            continue
        function.restype = _Handler
        return function(handler)
    return None
