"""The built-in recipes: those that begin a run, those that go on with one, and those that compare with one."""

from __future__ import annotations

from growkit.cli.recipes import built_in

EXTENSIONS = {"second-text": "first-text"}  # what goes on with a run of which recipe
# What needs a reference: a run of which recipe.
CHOOSING = {"rho-1": "quickstart-static", "rho-loss": "quickstart-static"}
RECIPES = {name: path for name, path in built_in().items() if name not in EXTENSIONS | CHOOSING}
