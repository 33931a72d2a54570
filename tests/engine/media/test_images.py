"""Images: PIL's own values, limits before decoding, reasons for what is refused."""

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.errors import RequestError
from engine.media.images import decode_image
from engine.media.limits import MediaLimits
from tests.engine.media.make_images import SIGNATURE, chunk, encode, noise, png, png_header, text_bomb

LIMITS = MediaLimits()
RGB = Image.fromarray(noise())


def pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def same(found: Image.Image, expected: Image.Image) -> None:
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def refusal(data: bytes, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(RequestError) as caught:
        decode_image(data, limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("WEBP", {}), ("BMP", {}), ("GIF", {})],
)
def test_the_formats_have_pils_values(kind: str, options: dict[str, Any]) -> None:
    data = encode(RGB, kind, **options)
    same(decode_image(data, LIMITS), pil(data).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encode(RGB, "PNG", exif=exif.tobytes()), LIMITS)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)  # fmt: skip
    same(found, RGB if turn is None else RGB.transpose(turn))


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "YCbCr"])
def test_modes_of_jpeg_and_grey_have_pils_values(mode: str) -> None:
    data = encode(RGB.convert(mode), "PNG" if mode == "1" else "JPEG")
    same(decode_image(data, LIMITS), pil(data).convert("RGB"))


def test_alpha_is_dropped_as_pils_convert_does() -> None:
    rgba = Image.fromarray(noise(bands=4), "RGBA")
    same(decode_image(encode(rgba, "PNG"), LIMITS), rgba.convert("RGB"))
    grey = rgba.convert("LA")
    same(decode_image(encode(grey, "PNG"), LIMITS), grey.convert("RGB"))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))])
def test_palettes_with_transparency_have_pils_values(transparency: Any) -> None:
    palette = RGB.quantize(16)
    data = encode(palette, "PNG", transparency=transparency)
    same(decode_image(data, LIMITS), palette.convert("RGB"))


def test_16_bit_grey_has_the_high_bytes_that_pil_takes_of_16_bit_color() -> None:
    wide = np.random.default_rng(1).integers(0, 1 << 16, (24, 40), dtype=np.uint16)
    color = pil(png(np.repeat(wide[..., None], 3, axis=2)))
    assert color.mode == "RGB"
    same(decode_image(png(wide), LIMITS), color)
    assert np.asarray(pil(png(wide)).convert("RGB")).mean() > 250  # what PIL itself would make of it: white


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    found = decode_image(encode(Image.new("RGB", size, (1, 2, 3)), "PNG"), LIMITS)
    assert found.size == size
    assert found.getpixel((0, 0)) == (1, 2, 3)


def test_the_first_picture_of_a_cameras_jpeg_counts() -> None:
    small = Image.fromarray(noise(8, 8, seed=3))
    data = encode(RGB, "MPO", save_all=True, append_images=[small])
    same(decode_image(data, LIMITS), pil(encode(RGB, "JPEG")).convert("RGB"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "is animated (3 frames)" in refusal(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='10'/>", "looks like SVG"),
        (b"<?xml version='1.0'?><!-- x --><svg/>", "looks like SVG"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"%PDF-1.7", "PDF"),
        (encode(RGB, "TIFF"), "looks like TIFF"),
        (b"\0\0\0\x20ftypheic" + bytes(40), "HEIC"),
        (bytes(64), "none of PNG, JPEG, WebP, GIF and BMP"),
        (encode(RGB, "PPM"), "none of PNG"),
        (encode(RGB, "JPEG")[:600], "Truncated"),
        (encode(RGB, "JPEG")[:-300], "truncated"),
        (encode(RGB, "PNG")[:-300], "can't be decoded"),
        (encode(RGB, "WEBP")[:-200], "can't be"),
        (encode(RGB, "BMP")[:-200], "truncated"),
        (SIGNATURE + chunk(b"IHDR", bytes(13)), "can't be"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


def test_limits_are_checked_in_the_header() -> None:
    tracemalloc.start()
    try:
        huge = png_header(100_000, 100_000) + chunk(b"IDAT", b"")
        assert "has 10,000,000,000 pixels, but at most" in refusal(huge)
        assert "(--max-image-pixels)" in refusal(png_header(10_000, 10_000) + chunk(b"IDAT", b""))
        assert "a side may have at most" in refusal(png_header(40_000, 1) + chunk(b"IDAT", b""))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "at most 500 are allowed" in refusal(encode(RGB, "PNG"), MediaLimits(max_image_pixels=500))


@pytest.mark.parametrize("place", ["before", "after"])
def test_bombs_in_text_chunks_are_not_inflated(place: str) -> None:
    bomb, plain = text_bomb(256), png(noise())
    end = chunk(b"IEND", b"")
    data = png(noise(), bomb) if place == "before" else plain.removesuffix(end) + bomb + end
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        assert "Decompressed data too large" in refusal(data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
