"""What the server of forked test processes loads once, so that none of them does it for itself: beside the modules that
a run imports late, the report's library, packed."""

import PIL.Image
import PIL.PngImagePlugin

from growkit.cli import checkpoints, training  # noqa: F401
from growkit.report import page
from tests import support  # noqa: F401

PIL.Image.preinit()
page._compressed(page._library())
