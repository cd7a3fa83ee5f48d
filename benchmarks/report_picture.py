"""Takes the README's picture: the top of a run's `report.html`, as Chromium shows it.

Run as `python benchmarks/report_picture.py RUN docs/images/report.png`. It needs Debian's `chromium`.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

SIZE = (1180, 1130)
"""Width and height in pixels: the answer and the learning curves."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    page = arguments.run.resolve() / "report.html"
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        command += [f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=20000"]
        command += [f"--screenshot={arguments.output.resolve()}", page.as_uri()]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
