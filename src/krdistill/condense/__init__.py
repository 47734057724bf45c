"""Small sets with soft labels in place of large long-tailed ones.

``selection.py`` chooses real images, ``matching.py`` makes synthetic ones by distribution matching; ``making.py``
labels them with a teacher's rectified answers and writes a folder that an ordinary run trains a student on.
"""

from __future__ import annotations

from .making import (
    METHODS,
    RECTIFIERS,
    Condensed,
    CondenseOptions,
    condense,
    condense_images,
    soft_labels,
    write_condensed,
)
from .matching import match_distributions
from .selection import herd, random_rows

__all__ = [
    "METHODS",
    "RECTIFIERS",
    "CondenseOptions",
    "Condensed",
    "condense",
    "condense_images",
    "herd",
    "match_distributions",
    "random_rows",
    "soft_labels",
    "write_condensed",
]
