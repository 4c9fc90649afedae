"""How sure a figure over documents is: bootstrap over documents, paired between models that read the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 2_000
_AT_ONCE = 1 << 22  # drawn document numbers held at once


def bits_interval(nats: Sequence[float], sizes: Sequence[int], *, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval (percentiles) of bits per byte over documents with `nats` and `sizes` in bytes; None for fewer than two."""
    import numpy as np

    if len(nats) < 2:
        return None
    sums, totals = _resampled([nats, sizes], seed)
    return _ends(sums / totals / np.log(2))


def change_interval(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of sum(second) / sum(first) - 1 over the same documents drawn together; None for fewer than two."""
    if len(first) < 2:
        return None
    before, after = _resampled([first, second], seed)
    return _ends(after / before - 1)


def _resampled(columns: Sequence[Sequence[float]], seed: int) -> tuple[NDArray[np.float64], ...]:
    """Sums [RESAMPLES] of each column over documents drawn with replacement, the same draw for all columns."""
    import numpy as np

    values = [np.asarray(c, np.float64) for c in columns]
    count, rng = len(values[0]), np.random.default_rng(seed)
    step = max(1, _AT_ONCE // count)
    parts: list[list[NDArray[np.float64]]] = [[] for _ in values]
    for start in range(0, RESAMPLES, step):
        drawn = rng.integers(0, count, (min(step, RESAMPLES - start), count))
        for part, column in zip(parts, values, strict=True):
            part.append(column[drawn].sum(axis=1))
    return tuple(np.concatenate(part) for part in parts)


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(values, [0.025, 0.975])
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else (0.0, 0.0)
