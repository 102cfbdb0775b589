"""Pixels equal open_clip's own transform, and the hash knows everything that decides them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from retrieval.model.preprocess import MODES, Preprocess


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@settings(max_examples=80)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(MODES),
    size=st.sampled_from([(32, 32), (24, 40)]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
def test_pixels_equal_open_clips(width, height, mode, size, interpolation):
    if max(width, height) > 4 * min(width, height):  # beyond, the source is cropped first
        width = height = min(width, height)
    if mode == "shortest" and size[0] != size[1]:
        interpolation = "bicubic"  # open_clip forgets the interpolation there
    config = PreprocessCfg(size=size, resize_mode=mode, interpolation=interpolation, fill_color=0)
    transform = image_transform_v2(config, is_train=False)
    image = noise(width, height)
    ours = Preprocess.from_config(vars(config))
    pixels = ours(image).astype(np.float32) / 255
    assert pixels.shape == (*size, 3)
    got = (pixels - np.float32(ours.mean)) / np.float32(ours.std)
    np.testing.assert_allclose(got.transpose(2, 0, 1), transform(image).numpy(), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(40_000, 3), (2, 30_000), (1, 1)])
def test_extreme_shapes_neither_fail_nor_explode(mode, size):
    preprocess = Preprocess(size=(224, 224), mode=mode)
    pixels = preprocess(noise(*size))
    assert (pixels.shape, pixels.dtype) == ((224, 224, 3), np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_are_converted(mode):
    image = noise(50, 40).convert(mode)
    expected = Preprocess(size=(32, 32))(image.convert("RGB"))
    np.testing.assert_array_equal(Preprocess(size=(32, 32))(image), expected)


def test_a_draft_decoded_jpeg_gives_nearly_the_same_pixels(tmp_path):
    from retrieval.images import decode

    smooth = noise(40, 30).resize((1600, 1200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    preprocess = Preprocess(size=(224, 224), mode="shortest")
    full = preprocess(decode(tmp_path / "a.jpg"))
    draft = decode(tmp_path / "a.jpg", draft_size=preprocess.draft_size)
    assert draft.size == (800, 600)
    assert np.abs(preprocess(draft).astype(int) - full).mean() < 1


def test_the_hash_changes_with_every_field_and_with_nothing_else():
    base = Preprocess()
    others = [
        Preprocess(size=(225, 224)),
        Preprocess(mode="squash"),
        Preprocess(interpolation="bilinear"),
        Preprocess(mean=(0.5, 0.5, 0.4)),
        Preprocess(std=(0.5, 0.5, 0.4)),
        Preprocess(fill=1),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 7
    assert Preprocess().hash == base.hash
    assert len(base.hash) == 64
    # Written into indexes: a change here makes every existing one stale, so it must be meant.
    assert base.hash.startswith("a751ed154e350a91")


def test_configurations_are_read():
    mini = {"size": [224, 224], "mode": "squash", "interpolation": "bicubic", "mean": [0.5] * 3}
    assert Preprocess.from_config(mini) == Preprocess(mode="squash")
    assert Preprocess.from_config({"size": 64, "std": 0.25}).size == (64, 64)
    clip = {"size": (32, 32), "mode": "RGB", "resize_mode": "longest", "fill_color": 7}
    assert Preprocess.from_config(clip) == Preprocess((32, 32), "longest", fill=7)
    assert Preprocess(size=(10, 20)).draft_size == (40, 20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resize": 3}, "unknown preprocessing resize; valid: size"),
        ({"mode": "crop"}, "shortest, longest, squash"),
        ({"interpolation": "random"}, "bicubic"),
        ({"size": (0, 3)}, "height, width"),
        ({"std": (0, 1, 1)}, "std > 0"),
        ({"resize_mode": "squash", "mode": "L"}, "RGB"),
    ],
)
def test_wrong_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Preprocess.from_config(config)
