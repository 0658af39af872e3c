"""The walk through a GIF: whole files pass, and what is cut out of the middle is noticed."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from clips import make_clip
from PIL import Image

from vrthinker.video.pyav import gif


def test_the_pixels_of_every_encoder_are_counted_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every picture is counted here, also those that are not suspect."""
    monkeypatch.setattr(gif, "_is_suspect", lambda blocks: True)
    rng = np.random.default_rng(1)
    noise = [Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)) for _ in range(3)]
    noise[0].save(tmp_path / "noise.gif", save_all=True, append_images=noise[1:])
    flat = [Image.new("1", (300, 200), i % 2) for i in range(3)]
    flat[0].save(tmp_path / "flat.gif", save_all=True, append_images=flat[1:], comment=b"two colours")
    make_clip(tmp_path / "drawn.gif", 3, (144, 192), "gif")
    for name in ("noise", "flat", "drawn"):
        data = (tmp_path / f"{name}.gif").read_bytes()
        assert gif.examine(io.BytesIO(data)) == (3, None), name


def test_a_part_that_is_cut_out_is_noticed(tmp_path: Path) -> None:
    """The walk finds its way again behind the hole, in the data of a later picture."""
    data = make_clip(tmp_path / "a.gif", 20, (72, 96), "gif").read_bytes()
    rng = random.Random(4)
    found_again = 0
    for _ in range(200):
        start = rng.randrange(900, len(data) - 6000)
        length = rng.randrange(300, 5000)
        spoiled = data[:start] + data[start + length :]
        n_pictures, reason = gif.examine(io.BytesIO(spoiled))
        assert reason is not None or n_pictures == 20
        found_again += reason is not None and "in the picture" in reason
    assert found_again > 5


def test_uneven_blocks_alone_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gif"
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 40), np.uint8)).save(path)
    data = path.read_bytes()
    # A block of 255 bytes, written as two.
    at = next(at for at in range(13, len(data)) if data[at] == 255 and data[at + 256] == 255)
    split = data[:at] + bytes([55]) + data[at + 1 : at + 56] + bytes([200]) + data[at + 56 :]
    assert gif.examine(io.BytesIO(split)) == (1, None)
    swapped = data[:at] + bytes([55]) + data[at + 1 : at + 56] + data[at + 256 :]
    assert gif.examine(io.BytesIO(swapped)) == (
        0,
        f"the file is damaged in the picture at byte {data.index(b',', 700)}",
    )
    monkeypatch.setattr(gif, "_MAX_COUNTED_BYTES", 10)
    assert gif.examine(io.BytesIO(swapped)) == (1, None), "counting has an end"


@pytest.mark.parametrize(
    ("n_pixels", "min_size", "codes", "fits"),
    [
        (3, 2, [4, 0, 1, 2, 5], True),
        (4, 2, [4, 0, 1, 2, 5], False),
        (2, 2, [4, 0, 1, 2, 5], False),
        (4, 2, [4, 0, 4, 0, 4, 0, 4, 0], True),  # without an end code
        (3, 2, [4, 0, 6, 5], True),  # the code that stands for the string before and its first pixel
        (3, 2, [4, 6, 5], False),
        (3, 2, [4, 0, 7, 5], False),
    ],
)
def test_codes_are_counted(n_pixels: int, min_size: int, codes: list[int], fits: bool) -> None:
    bits = sum(code << (3 * place) for place, code in enumerate(codes))
    data = bits.to_bytes(-(-3 * len(codes) // 8), "little")
    assert gif._fills(n_pixels, min_size, data) is fits


def test_unknown_extensions_are_damage() -> None:
    head = b"GIF89a" + bytes([4, 0, 4, 0, 0, 0, 0])
    for extension, is_known in (
        (b"", True),
        (b"!\xf9\x04abcd\0", True),
        (b"!\xfe\x02hi\0", True),
        (b"!\xfe\0", True),
        (b"!\xf9\x03abc\0", False),
        (b"!\xf9\0", False),
        (b"!\x77\x02hi\0", False),
    ):
        expected = None if is_known else "the file is damaged at byte 13"
        assert gif.examine(io.BytesIO(head + extension + b";")) == (0, expected)
    for min_size in (0, 12):
        picture = b"," + bytes(8) + b"\0" + bytes([min_size]) + b"\1\0\0"
        reason = "the file is damaged in the picture at byte 13"
        assert gif.examine(io.BytesIO(head + picture + b";")) == (0, reason)
    assert gif.examine(io.BytesIO(head + b";" + bytes(64))) == (0, None)
    reason = "the file is damaged at byte 13 (it goes on after its end)"
    assert gif.examine(io.BytesIO(head + b";" + bytes(5000))) == (0, None), "padding"
    assert gif.examine(io.BytesIO(head + b";" + b"x" * 65)) == (0, reason)
    assert gif.examine(io.BytesIO(head + b";" + bytes(100) + b"x")) == (0, reason)
    for cut in (head + b"!", head + b"!\xf9\x04a", head + b",", head + b",123456789\x02\x05ab", head[:5]):
        assert gif.examine(io.BytesIO(cut)) == (0, "the file is cut short (its trailer is missing)")
