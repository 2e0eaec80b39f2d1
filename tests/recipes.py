"""The built-in recipes: those that begin a run, and those that go on with one."""

from __future__ import annotations

from growkit.cli.recipes import built_in

EXTENSIONS = {"second-text": "first-text"}  # what goes on with a run of which recipe
RECIPES = {name: path for name, path in built_in().items() if name not in EXTENSIONS}
