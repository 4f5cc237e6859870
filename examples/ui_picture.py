"""Makes the picture of the web page from a run of `finetune demo`: python examples/ui_picture.py RUN docs/ui.png

It needs Chromium (`apt install chromium`) and the extra [ui].
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, COLOURS = 1180, 1560, 128
LOOKED = 6_000  # milliseconds of the page's own time: it asks the server twice, and shows the images


def photograph(run: Path, file: Path) -> None:
    """Opens the page of a finished run in a browser without a window, and writes what it shows.

    Raises:
        RuntimeError: there is no Chromium, or it did not write a picture.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise RuntimeError("there is no Chromium on this machine: install it (apt install chromium)")
    with tempfile.TemporaryDirectory() as own:
        command = [sys.executable, "-m", "finetune", "ui", "--port", "0", "--runs", str(run.resolve().parent)]
        command += ["--folder", own]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        try:
            assert server.stdout is not None
            address = re.findall(r"http://[\d.]+:\d+/", server.stdout.readline())[0]
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={own}/b"]
            options += [f"--window-size={WIDTH},{HEIGHT}", f"--virtual-time-budget={LOOKED}", f"--screenshot={file}"]
            subprocess.run([browser, *options, f"{address}#/run/{run.name}"], check=True, capture_output=True)
        finally:
            server.terminate()
            server.wait()
    if not file.is_file():
        raise RuntimeError(f"{browser} wrote no picture: try it by hand")
    with Image.open(file) as shown:
        shown.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    photograph(Path(sys.argv[1]), Path(sys.argv[2]))
