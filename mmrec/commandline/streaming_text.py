"""Text out of tokens as they come, never half a character."""

from collections.abc import Callable, Iterable, Iterator

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8, and a token holds at least one


def text_pieces(token_ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yield the text of tokens in pieces that are whole characters.

    A byte-level token may end within a character; decoded alone it would show a replacement mark. Such tokens wait for
    those that complete them. Bytes that never become a character come out as the mark, as in `decode` of the whole.

    Args:
        token_ids: ids, one by one.
        decode: text of a list of ids; joining the texts of two lists must give the text of both where they part between characters.
    """
    waiting: list[int] = []
    for token in token_ids:
        waiting.append(token)
        text = decode(waiting)
        if text.endswith(_REPLACEMENT) and len(waiting) <= _LONGEST_CHARACTER:
            continue
        waiting = []
        yield text
    if waiting:
        yield decode(waiting)
