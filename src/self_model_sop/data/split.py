"""Train and validation by content hash: the same text always falls on the same side, however the data grows around it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .ngrams import Bits


def positions(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where contents lie in [0, 2^64): hashes of their keys, [contents, 2], independent of the hashes other stages sample by."""
    import numpy as np

    data = keys.astype("<u8").tobytes()
    hashes = (hashlib.blake2b(data[i : i + 16], digest_size=8, person=b"validation").digest() for i in range(0, len(data), 16))
    return np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)


def validation_groups(positions: NDArray[np.uint64], ratio: float, minimum: int) -> Bits:
    """Mask of the groups that go to validation.

    Args:
        positions: one hash per group, [groups].
        ratio: share of groups; a group is in by its own hash alone, so that more data moves none.
        minimum: small sets still get so many (at most a fifth of them, at least one of two): those with the lowest hashes.
    """
    import numpy as np

    chosen = np.zeros(len(positions), bool)
    if ratio <= 0 or len(positions) < 2:
        return chosen
    chosen = positions < np.uint64(ratio * 2**64)
    few = min(minimum, max(1, len(positions) // 5))
    if chosen.sum() < few:
        chosen = np.zeros(len(positions), bool)
        chosen[np.argsort(positions, kind="stable")[:few]] = True
    return chosen
