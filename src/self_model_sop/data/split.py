"""Train and validation by content hash: the same text always falls on the same side, however the data grows around it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def position(key: bytes) -> int:
    """Where a content lies in [0, 2^64): a hash of its folded text, independent of the hashes other stages sample by."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"validation").digest(), "big")


def validation_groups(positions: Sequence[int], ratio: float, minimum: int) -> set[int]:
    """Indices of the groups that go to validation.

    Args:
        positions: one hash per group, [groups].
        ratio: share of groups; a group is in by its own hash alone, so that more data moves none.
        minimum: small sets still get so many (at most a fifth of them, at least one of two): those with the lowest hashes.
    """
    if ratio <= 0 or len(positions) < 2:
        return set()
    chosen = {i for i, p in enumerate(positions) if p < ratio * 2**64}
    few = min(minimum, max(1, len(positions) // 5))
    if len(chosen) < few:
        chosen = set(sorted(range(len(positions)), key=lambda i: (positions[i], i))[:few])
    return chosen
