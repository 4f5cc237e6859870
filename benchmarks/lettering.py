"""How often `finetune data check` sees lettering on real photos: without any, and with some that is printed over them.

    OMP_NUM_THREADS=1 python benchmarks/lettering.py PHOTOS             # the subjects that set no limit
    OMP_NUM_THREADS=1 python benchmarks/lettering.py PHOTOS --tuning    # those that set the limits

PHOTOS holds a folder for each subject, without lettering on the photos. The first half of the subjects by name,
rounded up, sets the limits (data_tools/lettering.py). Each photo is printed over in every size and opacity; place,
words, colour and typeface go round. Each photo is made smaller to 1024 pixels first.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_tools.lettering import find_lines
from finetune.data.photos import image_files, read_image

SIDE = 1024
SIZES = (0.02, 0.035, 0.06, 0.1)  # the letters' size, of the photo's shorter side
OPACITIES = (0.35, 0.6, 1.0)
PLACES = ("top left", "top right", "bottom left", "bottom right", "bottom", "middle")
WORDS = ("© Jane Doe 2024", "SAMPLE IMAGE", "www.example.com", "Photo by A. Smith", "2024-06-18 14:05", "stockphoto")
COLOURS = ("white", "black", "white", "yellow", "white", "red")
DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
FACES = ("DejaVuSans.ttf", "", "DejaVuSerif-Bold.ttf", "", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")  # "": Pillow's


@dataclass(frozen=True)
class Print:
    """What is printed over a photo. `number` chooses place, words, colour and typeface."""

    size: float
    opacity: float
    number: int

    def over(self, photo: Image.Image) -> Image.Image:
        """The photo with it, RGB."""
        layer = Image.new("L", photo.size)
        font = self._font(max(8, round(self.size * min(photo.size))))
        words = WORDS[self.number % len(WORDS)]
        left, top, right, bottom = font.getbbox(words)
        room = (photo.width - (right - left), photo.height - (bottom - top))
        rest = 0.03 * min(photo.size)
        place = self.place
        x = rest if "left" in place else room[0] - rest if "right" in place else room[0] / 2
        y = rest if "top" in place else room[1] - rest if "bottom" in place else room[1] / 2
        ImageDraw.Draw(layer).text((x - left, y - top), words, fill=round(255 * self.opacity), font=font)
        colour = COLOURS[self.number // len(PLACES) % len(COLOURS)]
        return Image.composite(Image.new("RGB", photo.size, colour), photo, layer)

    @property
    def place(self) -> str:
        """Where it stands."""
        return PLACES[(self.number * 5 + self.number // len(PLACES)) % len(PLACES)]

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        file = DEJAVU / FACES[self.number % 5 + self.number % 2]
        return ImageFont.truetype(str(file), size) if file.is_file() else ImageFont.load_default(size)


def read_photos(folder: Path, tuning: bool) -> Iterator[tuple[str, Image.Image]]:
    """Name and copy of each photo, of the subjects that set the limits or of the others."""
    subjects = sorted(place for place in folder.iterdir() if place.is_dir())
    half = -(-len(subjects) // 2)
    for subject in subjects[:half] if tuning else subjects[half:]:
        for file in image_files(subject):
            image = read_image(file)[1]
            image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
            yield f"{subject.name}/{file.name}", image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--tuning", action="store_true")
    asked = parser.parse_args()
    alarms, hits, tried, number = [], Counter[str](), Counter[str](), 0
    photos = list(read_photos(asked.photos, asked.tuning))
    for name, photo in photos:
        alarms += [name] if find_lines(photo) else []
        for size in SIZES:
            for opacity in OPACITIES:
                printed = Print(size, opacity, number)
                number += 1
                found = bool(find_lines(printed.over(photo)))
                for key in (f"size {size:.1%}", f"opacity {opacity:.0%}", printed.place, "all"):
                    tried[key] += 1
                    hits[key] += found
    print(f"without lettering: {len(alarms)} of {len(photos)} photos named {alarms or ''}")
    for key in sorted(tried):
        print(f"{key:>14}: {hits[key]} of {tried[key]} found ({hits[key] / tried[key]:.0%})")


if __name__ == "__main__":
    main()
