"""Token ids to pieces of text, as they come."""

from __future__ import annotations

from typing import Any

__all__ = ["TextStream"]

_CUT = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes that are no whole character


class TextStream:
    """The text of an answer, piece by piece; no piece ends within a character.

    A token may be some bytes of a character, and what a token decodes to depends on the one before
    (most tokenizers drop the space before a first word). So a window of tokens is decoded: those of
    the last piece, for context, and those after it.

    Args:
        tokenizer: of ``transformers``; used for decoding only.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._context = 0  # first token of the last piece
        self._open = 0  # first token after it

    def add(self, token: int) -> str:
        """The text that is certain with one more token; mostly a word, or nothing."""
        self.ids.append(token)
        before, text = self._window()
        return "" if text.endswith(_CUT) else self._piece(before, text)

    def end(self) -> str:
        """What was held back, with U+FFFD for bytes whose rest never came."""
        return self._piece(*self._window())

    def _window(self) -> tuple[str, str]:
        return self._decode(self.ids[self._context : self._open]), self._decode(
            self.ids[self._context :]
        )

    def _piece(self, before: str, text: str) -> str:
        piece = text[len(before) :]
        if piece:
            self._context, self._open = self._open, len(self.ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
