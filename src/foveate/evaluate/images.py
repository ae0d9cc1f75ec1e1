"""Images from files and from bytes: checked before they are decoded, decoded when they are used, few of them kept."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

__all__ = ["MAX_PIXELS", "DataError", "StoredImage", "open_image", "opened"]

MAX_PIXELS = 50_000_000
"""Largest image that is decoded, from the command line, a data file or the page; a 48-megapixel photograph passes."""
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""Not all that Pillow knows: for some it starts other programs."""
_KEPT = 64_000_000
"""Pixels of the decoded images that are kept, whatever the number of samples: 192 MB."""
_ORIENTATION = 0x0112


class DataError(ValueError):
    """A data set or an image cannot be read. The message names the file and, where there is one, the line."""


def open_image(source: str | Path | bytes) -> Image.Image:
    """An RGB image, upright, from a path or from encoded bytes.

    Raises:
        DataError: no such file, no image, or one of more than `MAX_PIXELS`; names the file.
    """
    with opened(source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class StoredImage:
    """An image that stays in its file until somebody asks for it.

    Args:
        source: a path or encoded bytes.
        where: file and line that name the image, for complaints.

    Attributes:
        size: (width, height), upright.

    Raises:
        DataError: as `open_image` does, as far as the file's head tells.
    """

    def __init__(self, source: str | Path | bytes, where: str):
        self.source, self.where = source, where
        with self._named(), opened(source) as image:
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            self.size = image.size[::-1] if turned else image.size

    def open(self) -> Image.Image:
        """The image, see `open_image`; it may be shared. Raises `DataError`, naming the line."""
        with self._named():
            return _recent(self.source)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"data {self.where}: {error}") from error


@contextmanager
def opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """An image of which only the head was read yet."""
    name = "its bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        there = os.path.exists(source) and not os.path.isdir(source)
        raise DataError(f"image {name}: {'not a plain file' if there else 'no such file'}")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # Pillow may have been built without some
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name}: too large, at most {MAX_PIXELS // 10**6} megapixels ({error})") from error
    except Exception as error:  # decoders raise whatever they stumble over in a broken file
        reason = "not an image" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise DataError(f"image {name}: cannot be read ({reason})") from error


class _Recent:
    """Decoded images, the last used at the end; as many as `pixels` allow, at least one."""

    def __init__(self, pixels: int):
        self._pixels = pixels
        self._kept: OrderedDict[object, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, source: str | Path | bytes) -> Image.Image:
        key = source if isinstance(source, bytes) else (source, _stamp(source))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        image = open_image(source)
        with self._lock:
            self._kept[key] = image
            while len(self._kept) > 1 and sum(i.width * i.height for i in self._kept.values()) > self._pixels:
                self._kept.popitem(last=False)
        return image


def _stamp(path: str | Path) -> tuple[int, int] | None:
    """Tells a file that was written anew from the one before."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


_recent = _Recent(_KEPT)
