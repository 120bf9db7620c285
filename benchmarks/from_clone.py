# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Lets what is imported after this file find the project as it is in this clone, whether or not it is installed."""

import sys
from importlib import util
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def import_package(name: str, folder: Path):
    places = {"submodule_search_locations": [str(folder)]}
    spec = util.spec_from_file_location(name, folder / "__init__.py", **places)
    sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
for package, place in (("attnres_convert", "convert"), ("attnres_recipes", "scripts/recipes")):
    if package not in sys.modules:
        import_package(package, ROOT / place)
