"""Image files from users: checked before they are decoded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastspec.environment import max_image_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 8


def load_image(path: str | Path) -> Image:
    """Opens a PNG, JPEG or WEBP file as RGB, upright, transparency on white.

    The size is checked in the header, before any pixel is decoded.

    Raises:
        ValueError: for a file that is missing, not such an image, truncated, under 8 pixels on a side or
            over ``FASTSPEC_MAX_IMAGE_PIXELS``; the message says which.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image file not found: {path}")
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a {', '.join(FORMATS)} image") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, in force however ours is set
        raise ValueError(
            f"{path} has more pixels than the limit of {max_image_pixels():,} (FASTSPEC_MAX_IMAGE_PIXELS): {error}"
        ) from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    with image:
        width, height = image.size
        if width * height > max_image_pixels():
            raise ValueError(
                f"{path} has {width} x {height} pixels, more than the limit of {max_image_pixels():,} "
                "(FASTSPEC_MAX_IMAGE_PIXELS)"
            )
        if min(width, height) < MIN_SIDE:
            raise ValueError(
                f"{path} has {width} x {height} pixels; expected at least {MIN_SIDE} on each side"
            )
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
