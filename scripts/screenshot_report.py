"""Takes a picture of a run's report in a headless Chromium, by day and by night.

    python scripts/screenshot_report.py runs/quickstart [-o docs/results/report.png]
    python scripts/screenshot_report.py runs/altup --section blocks -o docs/results/altup_blocks.png

Writes the report first, then a PNG of its upper part, or of one section: the left half in light colours, the right half
in dark ones.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from matplotlib import image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.report.page import write_report  # noqa: E402
from growkit.report.run_summary import read_runs  # noqa: E402
from tests.browser import browser, missing  # noqa: E402

WIDTH, HEIGHT = 1180, 1160  # pixels: the figures, the loss, the growth steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "results" / "report.png")
    parser.add_argument("--section", help="the id of a section: that alone, whatever its height")
    options = parser.parse_args()
    if (reason := missing()) is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        write_report(read_runs(options.runs), file)
        with browser(Path(folder) / "profile") as page:
            halves = []
            for dark in (False, True):
                page.open(file, width=WIDTH, height=HEIGHT, dark=dark)
                shot = page.find(f"#{options.section}").screenshot_as_png if options.section else None
                halves.append(image.imread(io.BytesIO(shot or page.driver.get_screenshot_as_png())))
    shown = halves[0].copy()
    middle = shown.shape[1] // 2
    shown[:, middle:] = halves[1][:, middle:]
    image.imsave(options.output, shown)
    print(f"wrote {options.output} ({options.output.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
