"""Images in the formats of files, decoded as transformers' load_image does. Called by preparation and by pixels."""

import io
import struct
import zlib
from typing import Any, Final, Literal

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_DEEP: Final = ("I", "F")
"""What the names of modes begin with whose values have more than 8 bits; Pillow would cut them off at 255."""


class Unreadable(Exception):
    """What is wrong with an image."""


def opened(content: bytes, mode: Literal["RGB", "L"]) -> Any:
    """A Pillow image, upright as its camera was held; of an animation the first frame.

    Raises:
        Unreadable: it is damaged, too large, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if image.mode.startswith(_DEEP):
            raise Unreadable("has more than 8 bits a channel, of which no model here would see more than the lowest 8")
        image.load()
        return ImageOps.exif_transpose(image).convert(mode)
    except Image.DecompressionBombError as error:
        raise Unreadable(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise Unreadable("is no image, or a damaged one") from error
