"""Weight families: each module contains the config fields, weight tables and defaults of one or more families.

Each module defines the tuple `FAMILIES`, which contains `Family` objects. The function `families` finds all modules in
this folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from vlm.weights.family import Family


@cache
def families() -> tuple[Family, ...]:
    """Return the families of all modules in this folder, sorted by name."""
    names = [found.name for found in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(sorted((family for module in modules for family in module.FAMILIES), key=lambda family: family.name))
