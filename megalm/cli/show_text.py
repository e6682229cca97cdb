"""Generated text on a terminal, as it comes.

Tokens of several prompts come at once, and a terminal has one place to write: the first prompt that is not finished is
written as it grows, and what the others have become meanwhile follows as soon as it is their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megalm.metrics.console import showable
from megalm.plugin.contract.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for a character of which some bytes are still to come."""


class TextStream:
    """Writes prompts and what follows them, in order."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        hidden: frozenset[int],
        write: Callable[[str], None],
        encoding: str,
    ) -> None:
        """``hidden``: tokens that are not written, such as those that end the text."""
        self._tokenizer, self._hidden = tokenizer, hidden
        self._write, self._encoding = write, encoding
        self._ids = [list(ids) for ids in prompts]
        self._ended = [False] * len(prompts)
        self._turn = 0
        self._written = ""
        if prompts:
            self._begin()

    def token(self, prompt: int, token: int) -> None:
        """A token has come."""
        if token not in self._hidden:
            self._ids[prompt].append(token)
        if prompt == self._turn:
            self._grow()

    def end(self, prompt: int) -> None:
        """No more tokens follow this prompt."""
        self._ended[prompt] = True
        while self._turn < len(self._ids) and self._ended[self._turn]:
            self._grow(last=True)
            self._write("\n")
            self._turn += 1
            if self._turn < len(self._ids):
                self._begin()

    def _begin(self) -> None:
        if len(self._ids) > 1:
            self._write(f"{'' if self._turn == 0 else chr(10)}[{self._turn + 1}]\n")
        self._written = ""
        self._grow()

    def _grow(self, *, last: bool = False) -> None:
        """Write what is new, up to a character that is not whole yet."""
        text = self._tokenizer.decode(self._ids[self._turn])
        whole = text if last else text.rstrip(_UNFINISHED)
        if whole.startswith(self._written):
            new, self._written = whole[len(self._written) :], whole
            if new:
                self._write(showable(new, self._encoding))
