"""Image files as people have them are read as 8-bit RGB in the frame of their labels, or refused with a reason."""

import errno
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from corpus import TOO_LARGE, corpus, png_chunk

from handlers.detection.data import ImageError, read_image

WIDTH, HEIGHT = 48, 32


def picture() -> np.ndarray:
    """RGB with a red upper left quarter, so that colour order and orientation show."""
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    image[: HEIGHT // 2, : WIDTH // 2] = (200, 30, 60)
    return image


def encoded(image: np.ndarray, ext: str) -> bytes:
    code = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    if image.ndim == 3:
        image = cv2.cvtColor(image, code[image.shape[2]])
    ok, data = cv2.imencode(ext, image)
    assert ok
    return data.tobytes()


def with_exif(jpeg: bytes, orientation: int) -> bytes:
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def assert_is_picture(image: np.ndarray, tolerance: int = 0) -> None:
    assert image.dtype == np.uint8
    assert image.shape == (HEIGHT, WIDTH, 3)
    difference = np.abs(image.astype(int) - picture())
    # JPEG blurs the border between the two colours.
    assert difference[2:12, 2:18].max() <= tolerance
    assert difference[20:, 28:].max() <= tolerance


@pytest.mark.parametrize("ext", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
def test_common_formats_are_rgb(tmp_path: Path, ext: str) -> None:
    """The channels come out as red, green, blue."""
    (tmp_path / "x").write_bytes(encoded(picture(), ext))
    assert_is_picture(
        read_image(tmp_path / "x", WIDTH, HEIGHT), tolerance=0 if ext in (".png", ".bmp", ".tiff") else 12
    )


def test_a_png_named_jpg(tmp_path: Path) -> None:
    """The content decides, not the name."""
    (tmp_path / "x.jpg").write_bytes(encoded(picture(), ".png"))
    assert_is_picture(read_image(tmp_path / "x.jpg"))


def test_grey(tmp_path: Path) -> None:
    """Grey becomes three equal channels."""
    (tmp_path / "x").write_bytes(encoded(picture()[..., 0], ".png"))
    image = read_image(tmp_path / "x")
    assert (image == picture()[..., :1]).all()


def test_sixteen_bits(tmp_path: Path) -> None:
    """The upper eight of sixteen bits are kept."""
    (tmp_path / "x").write_bytes(encoded(picture().astype(np.uint16) * 257, ".png"))
    assert_is_picture(read_image(tmp_path / "x"))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_twelve_bits_in_sixteen(tmp_path: Path, suffix: str) -> None:
    """As cameras write them: the upper eight of the twelve, and not of the sixteen, which are all but black."""
    (tmp_path / "x").write_bytes(encoded(picture().astype(np.uint16) * 16, suffix))
    assert_is_picture(read_image(tmp_path / "x", WIDTH, HEIGHT))


@pytest.mark.parametrize("highest", [15, 16, 200])
def test_a_dark_image_of_sixteen_bits(tmp_path: Path, highest: int) -> None:
    """From 4096 on all sixteen bits are meant, however few the upper eight are."""
    image = np.full((HEIGHT, WIDTH), highest << 8 | 0xFF, np.uint16)
    (tmp_path / "x").write_bytes(encoded(image, ".png"))
    expected = (highest << 8 | 0xFF) >> (4 if highest == 15 else 8)
    assert (read_image(tmp_path / "x") == expected).all()


def test_floats(tmp_path: Path) -> None:
    """Of a format that has floats only OpenCV's own conversion is taken."""
    (tmp_path / "x").write_bytes(encoded(picture().astype(np.float32) / 255, ".hdr"))
    image = read_image(tmp_path / "x", WIDTH, HEIGHT)
    assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    """A transparent pixel keeps its colour."""
    (tmp_path / "x").write_bytes(encoded(np.dstack([picture(), np.zeros((HEIGHT, WIDTH), np.uint8)]), ".png"))
    assert_is_picture(read_image(tmp_path / "x"))


def test_palette(tmp_path: Path) -> None:
    """A palette PNG becomes the colours of its palette."""
    indices = (picture()[..., 0] == 200).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"PLTE", bytes([90, 90, 90, 200, 30, 60]))
    (tmp_path / "x").write_bytes(png + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))
    assert_is_picture(read_image(tmp_path / "x"))


def test_cmyk(tmp_path: Path) -> None:
    """A CMYK JPEG, as printers' software writes it, is converted."""
    # Pillow comes with torchvision; nothing else here can write CMYK.
    pil = pytest.importorskip("PIL.Image")
    pil.fromarray(picture()).convert("CMYK").save(tmp_path / "x", "JPEG", quality=95)
    assert_is_picture(read_image(tmp_path / "x", WIDTH, HEIGHT), tolerance=16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """With an unknown size, and with the size as turned, the image is turned as its EXIF says."""
    turned = orientation >= 5
    (tmp_path / "x").write_bytes(with_exif(encoded(picture(), ".jpg"), orientation))
    unknown = read_image(tmp_path / "x")
    assert unknown.shape[:2] == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
    known = read_image(tmp_path / "x", HEIGHT if turned else WIDTH, WIDTH if turned else HEIGHT)
    assert (known == unknown).all()
    height, width = unknown.shape[:2]
    corners = [unknown[4, 4], unknown[4, width - 5], unknown[height - 5, width - 5], unknown[height - 5, 4]]
    red = next(i for i, corner in enumerate(corners) if corner[0] > 150)
    assert red == {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]


def test_exif_is_left_alone_where_the_labels_are_in_the_raw_frame(tmp_path: Path) -> None:
    """If only the file as it lies has the recorded size, it is not turned."""
    (tmp_path / "x").write_bytes(with_exif(encoded(picture(), ".jpg"), 6))
    assert_is_picture(read_image(tmp_path / "x", WIDTH, HEIGHT), tolerance=12)


def test_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    """Labels of an image of another size cannot be trusted."""
    (tmp_path / "x").write_bytes(encoded(picture(), ".png"))
    with pytest.raises(ImageError, match=r"is 48 x 32 pixels; recorded is 50 x 32"):
        read_image(tmp_path / "x", 50, 32)


@pytest.mark.parametrize("ext", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, ext: str, kept: float) -> None:
    """A file cut short is not read as if grey were its content."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(noise, ext)
    (tmp_path / "x").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match="truncated"):
        read_image(tmp_path / "x")


def test_empty_missing_and_foreign_files(tmp_path: Path) -> None:
    """Each gives its own reason."""
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ImageError, match="the file is empty"):
        read_image(tmp_path / "empty")
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        read_image(tmp_path / "missing")
    (tmp_path / "text").write_bytes(b"not an image" * 100)
    with pytest.raises(ImageError, match="not an image"):
        read_image(tmp_path / "text")


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    """A header that claims 100 000 x 100 000 pixels is refused before memory is taken for it."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    (tmp_path / "png").write_bytes(png + png_chunk(b"IEND", b""))
    with pytest.raises(ImageError, match="100000 x 100000: more than 100 megapixels"):
        read_image(tmp_path / "png")
    bmp = bytearray(encoded(picture(), ".bmp"))
    bmp[18:26] = struct.pack("<ii", 20_000, 20_000)
    (tmp_path / "bmp").write_bytes(bmp)
    # In a process of its own: OpenCV takes the limit when it is loaded, which the child leaves to `data`.
    code = "import sys; from pathlib import Path; from handlers.detection.data import *; read_image(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bmp"], capture_output=True, text=True, check=False)
    assert "ImageError: the image has more than 100 megapixels" in done.stderr


@pytest.mark.parametrize("name", [name for name, (_, reason) in corpus().items() if reason != TOO_LARGE])
def test_files_as_the_world_has_them(tmp_path: Path, name: str) -> None:
    """Read as RGB, the first frame of an animation; or refused with a reason. Whatever the name ends in."""
    data, reason = corpus()[name]
    (tmp_path / "x.jpg").write_bytes(data)
    if reason is None:
        image = read_image(tmp_path / "x.jpg")
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
    else:
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / "x.jpg")


def test_bombs_of_every_format_take_no_memory(tmp_path: Path) -> None:
    """A few bytes that claim hundreds of megapixels are refused before memory is taken for them."""
    bombs = {name: data for name, (data, reason) in corpus().items() if reason == TOO_LARGE}
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    # In a process of its own, for the reason above and to see its memory.
    code = """
import sys
from pathlib import Path
from handlers.detection.data import ImageError, read_image
def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_image(path)
    except ImageError as error:
        print(path.name, "|", error)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    *refused, kilobytes = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in refused] == sorted(bombs)
    assert all(TOO_LARGE in line for line in refused)
    assert int(kilobytes) < 100_000


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM])
def test_a_fault_of_the_machine_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """An image that this machine cannot read now is not left out of the training."""

    def broken(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_image(tmp_path / "x")
