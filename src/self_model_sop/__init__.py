"""self-model-sop: raw Chinese / domain text to a measured, deployable domain language model."""

from __future__ import annotations

__version__ = "0.1.0"
