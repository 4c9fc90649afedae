"""Many texts at once as arrays. A question about a thousand short texts costs one call instead of a thousand; what it answers for sure spares the exact, slower way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from .characters import classes, codepoints

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .characters import Codes
    from .ngrams import Bits, Ints


class Batch:
    """Texts one after the other.

    Attributes:
        texts, joined: as given, and one after the other.
        codes: their code points, [chars].
        lengths, starts, ends: of each text, in characters, [texts].
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import numpy as np

        self.texts = texts
        self.joined = "".join(texts)
        self.codes: Codes = codepoints(self.joined)
        self.lengths: Ints = np.fromiter(map(len, texts), np.int64, len(texts))
        self.ends: Ints = np.cumsum(self.lengths)
        self.starts: Ints = self.ends - self.lengths

    @cached_property
    def kinds(self) -> NDArray[np.uint8]:
        """The class of every character, [chars]."""
        return classes(self.codes)

    @cached_property
    def owners(self) -> NDArray[np.uint32]:
        """The text of every character, [chars]."""
        import numpy as np

        return np.repeat(np.arange(len(self.texts), dtype=np.uint32), self.lengths)

    def having(self, positions: Ints) -> Bits:
        """Mask of the texts in which at least one of the positions lies, [texts]."""
        import numpy as np

        out = np.zeros(len(self.texts), bool)
        out[np.searchsorted(self.ends, positions, side="right")] = True
        return out
