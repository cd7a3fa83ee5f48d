"""Marks where an answer differs from its reference, word by word."""

import difflib
import re
from dataclasses import dataclass

ALIKE = 0.3
"""Least similarity of two texts whose differences are worth reading; below it the whole answer counts as other."""


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer beside its reference."""

    kind: str
    """`same`, `extra` (in the answer only) or `lacking` (in the reference only)."""

    text: str


def difference(answer: str, reference: str) -> list[Piece]:
    """Return an answer in pieces, those that it lacks included. White space at the ends does not count.

    Args:
        answer: text of a model.
        reference: acceptable answer.
    """
    ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", text.strip()) for text in (answer, reference))
    matcher = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
    if matcher.ratio() < ALIKE:
        return [Piece("extra", answer.strip())]
    pieces = []
    for kind, start, end, our_start, our_end in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(ours[our_start:our_end])))
            continue
        pieces += [Piece("lacking", "".join(theirs[start:end]))] if end > start else []
        pieces += [Piece("extra", "".join(ours[our_start:our_end]))] if our_end > our_start else []
    return pieces
