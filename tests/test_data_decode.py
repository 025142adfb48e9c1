"""Decoding: every kind of image file becomes the RGB that Pillow shows; what cannot be read is named."""

import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import simclr.data.decode as decode_module
from simclr.data.decode import decode, decode_square, read_images, to_square


def picture(height: int = 20, width: int = 30) -> Image.Image:
    """A smooth picture with distinct corners, so that lossy formats stay near and a wrong turn is far."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray((np.stack((x, y, 1 - x * y), axis=-1) * 255).astype(np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("native", [True, False], ids=["torchvision", "pillow"])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_png_of_every_colour_type_is_what_pillow_shows(tmp_path, monkeypatch, mode, native):
    if not native:
        monkeypatch.setattr(decode_module, "_DECODE", None)
    image = picture().convert(mode)
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert torch.equal(decode((tmp_path / "a.png").read_bytes()), pixels(saved))


@pytest.mark.parametrize("kind", ["webp", "bmp", "gif", "tiff", "ppm"])
def test_other_formats_are_what_pillow_shows(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    picture().save(file)
    with Image.open(file) as saved:
        assert torch.equal(decode(file.read_bytes()), pixels(saved))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_near_what_pillow_shows(tmp_path, mode):
    picture().convert(mode).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as saved:
        difference = decode((tmp_path / "a.jpg").read_bytes()).int() - pixels(saved).int()
    assert difference.abs().max() <= 4, "two builds of libjpeg, and two roundings of CMYK"


@pytest.mark.parametrize("native", [True, False], ids=["torchvision", "pillow"])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, monkeypatch, orientation, kind, native):
    if not native:
        monkeypatch.setattr(decode_module, "_DECODE", None)
    file = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(file, exif=exif, quality=95)
    with Image.open(file) as saved:
        upright = pixels(ImageOps.exif_transpose(saved))
    assert (decode(file.read_bytes()).int() - upright.int()).abs().max() <= 4


@pytest.mark.parametrize("native", [True, False], ids=["torchvision", "pillow"])
def test_sixteen_bit_gray_keeps_its_high_byte(tmp_path, monkeypatch, native):
    if not native:
        monkeypatch.setattr(decode_module, "_DECODE", None)
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for kind in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"a.{kind}")
        image = decode((tmp_path / f"a.{kind}").read_bytes())
        assert torch.equal(image, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 32, 32))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode((tmp_path / "a.gif").read_bytes())[:, 0, 0].tolist() == [200, 0, 0]


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    picture().convert("P").save(tmp_path / "a.gif", transparency=0)
    picture().convert("P").save(tmp_path / "a.png", transparency=bytes([0, 128] * 8))
    for name in ("a.gif", "a.png"):
        assert decode((tmp_path / name).read_bytes()).shape == (3, 20, 30)


def test_an_image_of_the_right_size_is_left_bit_for_bit_and_others_keep_their_centre():
    image = torch.randint(256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(to_square(image, 16), image)
    wide = torch.full((3, 16, 40), 255, dtype=torch.uint8)
    wide[:, :, 12:28] = image
    assert torch.equal(to_square(wide, 16), image)
    assert torch.equal(to_square(wide.mT.contiguous(), 16), image.mT)


def test_resizing_is_antialiased():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(40).expand(3, 80, 80)
    small = to_square(stripes, 16)
    assert small.shape == (3, 16, 16)
    # One-pixel stripes average to gray; read at every fifth pixel they would stay black and white.
    assert (small[..., 1:-1].int() - 127).abs().max() <= 12


def photograph(height: int, width: int) -> Image.Image:
    """Coarse and fine detail, edges and grain, and nothing that a turn or a shift would leave alike."""
    generator = np.random.default_rng(0)
    pixels = np.array(picture(height, width), dtype=np.float64)
    for size in (5, 20, 80):
        cells = Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))
        pixels += 0.4 * (np.array(cells.resize((width, height), Image.Resampling.NEAREST)) - 127.5)
    return Image.fromarray((pixels + generator.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(1201, 900), (641, 999)])
def test_a_large_jpeg_is_read_reduced_and_is_near_what_all_of_its_pixels_give(
    tmp_path, monkeypatch, size, orientation, mode
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(*size).convert(mode).save(tmp_path / "a.jpg", exif=exif, quality=90)
    content = (tmp_path / "a.jpg").read_bytes()
    whole = {side: to_square(decode(content), side) for side in (24, 64)}
    monkeypatch.setattr(decode_module, "decode", None)  # would read all of the pixels
    for side, want in whole.items():
        got = decode_square(content, side)
        assert (got.shape, got.dtype) == ((3, side, side), torch.uint8)
        difference = (got.int() - want.int()).abs().float()
        assert difference.mean() <= 1, side
        assert difference.flatten().quantile(0.99) <= 5, side


def test_a_jpeg_that_is_not_eight_times_as_large_is_read_bit_for_bit(tmp_path):
    photograph(255, 300).save(tmp_path / "a.jpg", quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    assert torch.equal(decode_square(content, 32), to_square(decode(content), 32))
    assert not torch.equal(decode_square(content, 31), to_square(decode(content), 31))


def test_a_large_jpeg_cut_short_is_refused(tmp_path):
    photograph(640, 640).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    decode_square(content, 32)
    with pytest.raises(ValueError, match="cut off JPEG: it has no end of image"):
        decode_square(content[: len(content) // 2], 32)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_small_jpeg_cut_short_is_refused_though_its_thumbnail_has_an_end(progressive):
    thumbnail, file = io.BytesIO(), io.BytesIO()
    photograph(16, 16).save(thumbnail, "jpeg")
    photograph(64, 64).save(file, "jpeg", comment=thumbnail.getvalue(), progressive=progressive)  # in the header
    content = file.getvalue()
    assert content.find(b"\xff\xd9") < len(content) - 2
    for added in (b"", b"\0" * 7, b"what a camera adds"):
        assert torch.equal(decode(content + added), decode(content))
    for left in (len(content) - 2, len(content) - 40, len(content) // 2):
        with pytest.raises(ValueError, match="cut off JPEG: it has no end of image"):
            decode(content[:left])


@pytest.mark.parametrize("threads", [1, 3])
def test_every_file_that_cannot_be_read_is_counted_and_the_first_are_named(tmp_path, threads):
    for i in range(70):
        picture().save(tmp_path / f"{i:02}.png")
    picture(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "10.png").write_bytes(b"")
    (tmp_path / "20.png").write_text("hello")
    (tmp_path / "30.png").write_bytes((tmp_path / "31.png").read_bytes()[:100])
    (tmp_path / "65.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"cannot read 4 image files: .*10.png .*empty.*20.png .*30.png .*and 1 others"
    ):
        read_images(paths, 8, threads=threads)
    with pytest.raises(ValueError, match=r"cannot read 1 image file: .*65.jpg"):
        read_images([tmp_path / "65.jpg"], 8)


def test_a_few_files_are_shared_by_all_threads(tmp_path, monkeypatch):
    together = threading.Barrier(4)
    monkeypatch.setattr(decode_module, "decode", lambda content, rules: (together.wait(60), torch.zeros(3, 8, 8))[1])
    for i in range(4):
        (tmp_path / str(i)).touch()
    images = read_images([tmp_path / str(i) for i in range(4)], 8, threads=4)  # a barrier that breaks is an error
    assert images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_decodes_shares_no_image_among_more_threads_and_leaves_torch_its_own(tmp_path, monkeypatch, threads):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(decode_module, "decode", lambda content, rules: seen.append(torch.get_num_threads()) or 1 / 0)
    (tmp_path / "a").touch()
    try:
        torch.set_num_threads(3)
        with pytest.raises(ZeroDivisionError):
            read_images([tmp_path / "a"] * 4, 8, threads=threads)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(("alone", "in_threads"), [(0.0, 0.004), (0.002, 0.002)])
def test_files_are_read_alone_where_threads_are_slower(alone, in_threads):
    main, by = threading.get_ident(), {}

    def read(i):
        by.setdefault(i, []).append(threading.get_ident())
        time.sleep(alone if threading.get_ident() == main else in_threads)

    decode_module._alone_or_in_threads(read, 200, 4)
    assert sorted(by) == list(range(200))
    assert all(len(readers) == 1 for readers in by.values())
    rest = {reader for i in range(100, 200) for reader in by[i]}  # behind those that were tried
    assert (rest == {main}) is (alone < in_threads)


def test_threads_change_nothing(tmp_path):
    for i in range(130):
        Image.new("RGB", (9, 9), (i, 255 - i, 7)).save(tmp_path / f"{i:03}.png")
    paths = sorted(tmp_path.iterdir())
    one = read_images(paths, 9)
    assert torch.equal(one[:, 0, 0, 0], torch.arange(130, dtype=torch.uint8))
    assert torch.equal(read_images(paths, 9, threads=4), one)
