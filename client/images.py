"""Images as a base model reads them: decoded, upright, of its size, three channels of 8 bits.

What a site is given as an image may be anything. Only common formats are tried, none of them runs another program, and
no image is unpacked that would take more than a fixed number of pixels. How pixels are scaled to the numbers the network
computes with is the model's side.
"""

import io
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from confide.common.errors import DataError, MissingPackage, ModelError
from confide.common.examples import Pixels

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 1 << 26  # 8192 × 8192
MOST_FILE_BYTES = 64 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_LARGEST_SIDE = 4096
_BILINEAR, _BICUBIC = 2, 3  # the numbers of Pillow's filters, which preprocessor_config.json uses too


class ImageReader:
    """Turns images into what a base model reads. Make one with `load_image_reader`.

    Attributes:
        shape: (3, height, width) of what it gives.
    """

    def __init__(self, height: int, width: int, resample: int = _BILINEAR) -> None:
        self.shape = (3, height, width)
        self._resample = resample

    def read(self, image: bytes | str, folder: Path) -> Pixels:
        """Return an image as (3, height, width), uint8.

        It is turned as its EXIF data say and stretched to the model's size. Of a moving image the first picture is
        taken, transparency is left out, and 16-bit greys keep their upper eight bits.

        Args:
            image: The bytes of its file, or the path of that file within `folder`.
            folder: The directory of the table.

        Raises:
            ImagePathError: The path leads out of the folder.
            ImageError: There is no such file, or what it holds is no image that can be read.
        """
        return self._decoded(_contents(image, folder) if isinstance(image, str) else image)

    def _decoded(self, raw: bytes) -> Pixels:
        from PIL import Image, ImageOps

        if len(raw) > MOST_FILE_BYTES:
            raise ImageError
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata; what is too large is refused below
                with Image.open(io.BytesIO(raw), formats=FORMATS) as unverified:
                    _check_size(unverified)
                    unverified.verify()
                with Image.open(io.BytesIO(raw), formats=FORMATS) as opened:  # verifying uses an image up
                    upright = ImageOps.exif_transpose(opened)
                    resized = _coloured(upright).resize((self.shape[2], self.shape[1]), self._resample)
            return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))  # (3, height, width)
        except Exception as error:  # decoders raise whatever the bytes lead them to
            raise ImageError from error


class ImageError(DataError):
    """A file is missing, or holds no image that can be read."""

    def __init__(self) -> None:
        super().__init__(
            f"An image is missing, damaged, above {MOST_FILE_BYTES >> 20} MiB or {MOST_PIXELS} pixels, or none of "
            f"{', '.join(FORMATS)}. Mend or convert it."
        )


class ImagePathError(DataError):
    """The path of an image is absolute, or leads out of the directory of the table."""

    def __init__(self) -> None:
        super().__init__(
            "The path of an image is absolute or leads out of the directory of the table. Give it relative to that directory."
        )


def load_image_reader(base_directory: Path) -> ImageReader:
    """Return the reader of images for the base model in a directory.

    The size is `image_size` of its `config.json`: one number, or height and width. The filter is `resample` of its
    `preprocessor_config.json`, bilinear (2) or bicubic (3); bilinear if there is none.

    Raises:
        ModelError: The files do not say how large an image is, or the model reads others than images of three channels.
        MissingPackage: Pillow is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("PIL") is None:
        raise MissingPackage("pillow", "site")
    config = _settings(base_directory / "config.json")
    if config.get("num_channels", 3) != 3:
        raise ModelError(
            f"The base model in {base_directory} reads images that do not have 3 channels. Use one that does."
        )
    size = config.get("image_size")
    sides: list[Any] = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in sides):
        raise ModelError(
            f"{base_directory}/config.json names no image_size from 1 to {_LARGEST_SIDE}, so it is not said how large an "
            "image must be. Use a model for images, such as a ViT."
        )
    preprocessing = base_directory / "preprocessor_config.json"
    resample = _settings(preprocessing).get("resample", _BILINEAR) if preprocessing.exists() else _BILINEAR
    if not isinstance(resample, int) or resample not in {_BILINEAR, _BICUBIC}:
        raise ModelError(
            f"{preprocessing} asks for another filter than bilinear (2) or bicubic (3). Set resample to one of them."
        )
    height, width = sides
    return ImageReader(height, width, resample)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise TypeError
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path} is missing or not a JSON object ({type(error).__name__}). "
            "Give the directory of a model in Hugging Face's layout."
        ) from None
    return settings


def _contents(name: str, folder: Path) -> bytes:
    try:
        root = folder.resolve()
        # Links are followed first: what counts is where the file lies.
        path = (root / name.strip()).resolve()
        if Path(name.strip()).is_absolute() or not path.is_relative_to(root):
            raise ImagePathError
        if not path.is_file() or path.stat().st_size > MOST_FILE_BYTES:
            raise ImageError
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a name may be too long, hold a zero, or be a circle of links
        raise ImageError from error


def _check_size(image: "Image.Image") -> None:
    if image.width * image.height > MOST_PIXELS:
        raise ImageError


def _coloured(image: "Image.Image") -> "Image.Image":
    """Return an image with three channels of 8 bits."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ImageError  # nothing says which of so many greys is white
    # A palette may hold transparency, which Pillow can only leave out by way of RGBA.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
