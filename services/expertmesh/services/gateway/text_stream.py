"""Token ids to text as it grows: whole characters only, nothing from the first stop string on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Decodes token by token in time independent of the length of the text.

    Only a window of ids is decoded: those whose text has been given out last, as context (some
    decoders strip a space at the beginning), and those after. A text that ends with U+FFFD may
    end in the middle of a character, so it is held back. The method of Hugging Face's
    text-generation-inference.

    Llama's decoder gives up a whole run of byte tokens if one byte in it is wrong. Characters of
    such a run that have been given out stay; only what follows is decoded anew.

    Args:
        decode: the tokenizer's decode, without clean-up of spaces.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context_len = 0  # ids at the start of the window whose text is out

    def push(self, ids: Sequence[int]) -> str:
        """The text that is complete with these ids and has not been given out."""
        self._window += ids
        context, text = self._texts()
        if len(text) <= len(context) or text.endswith(_INCOMPLETE):
            return ""
        new_text = text[len(context) :]
        self._window = self._window[self._context_len :]
        self._context_len = len(self._window)
        return new_text

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD. Nothing may be pushed afterwards."""
        context, text = self._texts()
        return text[len(context) :]

    def _texts(self) -> tuple[str, str]:
        context = self._decode(self._window[: self._context_len])
        text = self._decode(self._window)
        if not text.startswith(context):
            text = context + self._decode(self._window[self._context_len :])
        return context, text


@dataclass(frozen=True)
class Piece:
    """Text to give out, and whether a stop string ended the generation after it."""

    text: str
    stopped: bool = False


class StopMatcher:
    """Finds the stop string that is complete first (of several, the longest) in growing text.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> Piece:
        """What can be given out after `text` has come."""
        self._held += text
        cut = self._first_stop()
        if cut is not None:
            out, self._held = self._held[:cut], ""
            return Piece(out, stopped=True)
        keep = self._undecided()
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return Piece(out)

    def flush(self) -> str:
        """What was held back."""
        out, self._held = self._held, ""
        return out

    def _first_stop(self) -> int | None:
        found = [(self._held.find(stop), len(stop)) for stop in self._stop]
        ends = [(at + length, at) for at, length in found if at >= 0]
        return min(ends)[1] if ends else None

    def _undecided(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


class TextStream:
    """Detokenizer and StopMatcher in one: the pieces' texts joined are the decoded text of all ids
    up to the first stop string."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(decode)
        self._matcher = StopMatcher(stop)

    def push(self, ids: Sequence[int]) -> Piece:
        """What can be given out after these ids have come."""
        return self._matcher.push(self._detokenizer.push(ids))

    def flush(self) -> Piece:
        """What is left when generation ends by itself."""
        last = self._matcher.push(self._detokenizer.flush())
        return last if last.stopped else Piece(last.text + self._matcher.flush())
