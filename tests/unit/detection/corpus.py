"""Image files as the world has them, made here: each with the reason for which it is not used, or None if it is."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

SIDE = 64

#: The reasons, as regular expressions.
EMPTY, TRUNCATED, DAMAGED = "is empty", "is truncated", "not an image, or a damaged one"
TOO_LARGE = "more than 100 megapixels"


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)


def pillow(form: str, mode: str = "RGB", frames: int = 1) -> bytes:
    """A picture in one of Pillow's formats, animated if it has several frames."""
    pictures = [Image.fromarray(np.roll(noise(), frame, axis=0)).convert(mode) for frame in range(frames)]
    out = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(out, form, **more)
    return out.getvalue()


def opencv(image: np.ndarray, ext: str = ".png") -> bytes:
    return bytes(cv2.imencode(ext, image)[1].tobytes())


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int) -> bytes:
    """A few kilobytes that claim to be, and begin like, an image of this size."""
    rows = zlib.compress(bytes(min((1 + 3 * width) * height, 20_000_000)), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def changed(data: bytes, after: bytes, skip: int, new: bytes) -> bytes:
    """`data` with `new` written over it, `skip` bytes after where `after` begins."""
    at = data.index(after) + skip
    return data[:at] + new + data[at + len(new) :]


def stray(jpeg: bytes, between: bytes) -> bytes:
    """`jpeg` with bytes that belong to nothing before its tables."""
    at = jpeg.index(b"\xff\xdb")
    return jpeg[:at] + between + jpeg[at:]


def tiff_bomb() -> bytes:
    data = bytearray(pillow("TIFF"))
    (directory,) = struct.unpack("<I", data[4:8])
    for entry in range(struct.unpack("<H", data[directory : directory + 2])[0]):
        at = directory + 2 + 12 * entry
        if struct.unpack("<H", data[at : at + 2])[0] in (256, 257):  # ImageWidth, ImageLength
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 30_000)
    return bytes(data)


def corpus() -> dict[str, tuple[bytes, str | None]]:
    """Name -> (file, reason or None)."""
    wide = struct.pack(">HH", 65_000, 65_000)
    files: dict[str, tuple[bytes, str | None]] = {
        "nothing": (b"", EMPTY),
        "text": (b"not an image" * 100, DAMAGED),
        "page": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", DAMAGED),
        "head of a png": (pillow("PNG")[:8], TRUNCATED),
        "png without rows": (changed(pillow("PNG"), b"IDAT", 4, bytes(50)), DAMAGED),
        "png of no size": (png_bomb(0, 0), DAMAGED),
        "png bomb": (png_bomb(30_000, 30_000), TOO_LARGE),
        "thin png bomb": (png_bomb(1, 2_000_000_000), TOO_LARGE),
        "jpeg bomb": (changed(pillow("JPEG"), b"\xff\xc0", 5, wide), TOO_LARGE),
        "stray byte in a jpeg": (stray(pillow("JPEG"), b"\x12"), None),
        "stray bytes in a jpeg": (stray(pillow("JPEG"), b"\x00\x12\xff\x00\x34"), None),
        "webp bomb": (changed(pillow("WEBP"), b"\x9d\x01\x2a", 3, struct.pack("<HH", 16_383, 16_383)), TOO_LARGE),
        "tiff bomb": (tiff_bomb(), TOO_LARGE),
        "gif bomb": (changed(pillow("GIF"), b"GIF8", 6, wide), TOO_LARGE),
        "bmp bomb": (changed(pillow("BMP"), b"BM", 18, struct.pack("<ii", 30_000, 30_000)), TOO_LARGE),
        "ppm bomb": (b"P6 30000 30000 255\n" + bytes(100), TOO_LARGE),
        "pgm beyond numbers": (b"P5 99999999999999999999 30000 255\n" + bytes(100), DAMAGED),
        "tiff of NaN": (opencv(np.full((9, 9, 3), np.nan, np.float32), ".tiff"), DAMAGED),
        "one pixel": (opencv(np.full((1, 1, 3), 9, np.uint8)), None),
        "one row": (opencv(np.full((1, 20_000, 3), 9, np.uint8)), None),
        "16 bits": (opencv(noise().astype(np.uint16) * 257), None),
        "grey": (pillow("PNG", "L"), None),
        "palette": (pillow("PNG", "P"), None),
        "black and white": (pillow("PNG", "1"), None),
        "cmyk jpeg": (pillow("JPEG", "CMYK"), None),
        "cmyk tiff": (pillow("TIFF", "CMYK"), None),
    }
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        files[f"animated {form}"] = (pillow(form, frames=5), None)
    for form in ("GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"):
        whole = pillow(form)
        files[f"whole {form}"] = (whole, None)
        files[f"half a {form}"] = (whole[: len(whole) // 2], DAMAGED)
    for form in ("JPEG", "PNG"):
        files[f"half a {form}"] = (pillow(form)[: len(pillow(form)) // 2], TRUNCATED)
    return files
