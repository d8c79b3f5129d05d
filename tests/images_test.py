"""Decoding against what was drawn, and squares against Pillow's own steps as other libraries take them."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fm_jax
from fm_jax import images
from fm_jax.errors import UserError


def saved(image, kind="png", **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def gradient(width, height):
    """Returns a picture whose red grows to the right and green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x + 90], axis=-1).astype(np.uint8))


def test_every_kind_of_picture_is_decoded():
    """Grey, 1 bit, palette, alpha (transparent parts are white), CMYK, 16 bits, animated; turned as the camera says."""
    rgb = lambda image: np.asarray(images.decode(image).convert("RGB"))
    red = Image.new("RGB", (6, 4), (200, 0, 0))
    clear = Image.new("RGBA", (6, 4), (200, 0, 0, 255))
    clear.putpixel((0, 0), (200, 0, 0, 0))
    clear.putpixel((1, 0), (200, 0, 0, 127))
    assert (rgb(saved(red)) == (200, 0, 0)).all() and rgb(saved(red)).shape == (4, 6, 3)
    assert (rgb(saved(red.convert("L"))) == 60).all() and (rgb(saved(Image.new("1", (6, 4), 1))) == 255).all()
    assert (rgb(saved(red.convert("P", palette=Image.Palette.ADAPTIVE))) == (200, 0, 0)).all()
    assert np.abs(rgb(saved(red.convert("CMYK"), "jpeg")).astype(int) - (200, 0, 0)).max() < 5
    found = rgb(saved(clear))
    assert found[0, :2].tolist() == [[255] * 3, [228, 128, 128]] and (found[1:] == (200, 0, 0)).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert rgb(saved(palette, transparency=1))[0].tolist() == [[200, 0, 0], [255] * 3]
    deep = np.array([[0, 256, 65535]], np.uint16)
    assert rgb(saved(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 1, 255]
    frames = saved(red, "gif", save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])
    assert (rgb(frames) == rgb(saved(red, "gif"))).all()
    exif = Image.Exif()
    exif[0x112] = 6   # turned by a quarter
    assert rgb(saved(red, "jpeg", exif=exif)).shape == (6, 4, 3)
    assert (rgb(np.full((4, 6), 9, np.uint8)) == 9).all() and (rgb(np.full((4, 6, 1), 9, np.uint8)) == 9).all()
    assert rgb(b"P5 2 1 255\n\x05\x07")[0, :, 0].tolist() == [5, 7]


@pytest.mark.parametrize("data, message", [
    (b"", "x.png: not an image that can be read"), (b"hello", "x.png: not an image that can be read"),
    (saved(gradient(60, 60))[:100], "x.png: not an image that can be read"),
    (b"P5 10000 10000 255\n", "x.png: 10000 x 10000 pixels are more than 50,000,000"),
    (np.zeros((4, 6, 2), np.uint8), r"x.png: an array uint8\[4, 6, 2\]"),
    (np.zeros((0, 6), np.uint8), "x.png: an array"),
    (np.zeros((4, 6), np.float32), "x.png: an array float32"), ("path", "x.png: an array"),
])
def test_what_is_no_image_is_named(data, message):
    with pytest.raises(UserError, match=message):
        images.decode(data, "x.png")


def test_every_damaged_file_is_an_image_or_an_error():
    """A byte changed at each of many places of each format: never another exception."""
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        data, bad = saved(gradient(20, 15), kind), 0
        for at in range(0, len(data), max(len(data) // 60, 1)):
            changed = bytearray(data)
            changed[at] ^= 0xFF
            try:
                images.square(images.decode(bytes(changed)), images.View(8))
            except UserError:
                bad += 1
        assert 0 < bad, kind


@pytest.mark.parametrize("size", [(40, 27), (27, 40), (16, 16), (9, 7), (1, 1), (300, 20)], ids=str)
def test_squares_are_those_of_other_libraries(size):
    """Resized by the shorter side and cropped in the middle, or to both sides: Pillow's pixels."""
    image, (width, height) = gradient(*size), size
    scaled = [16 if side == min(size) else int(16 * side / min(size)) for side in size]
    whole = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - 16) // 2, (scaled[1] - 16) // 2
    want = np.asarray(whole.crop((left, top, left + 16, top + 16)))
    got = images.square(image, images.View(16))
    if max(size) <= images.MOST_ELONGATED * min(size):
        np.testing.assert_array_equal(got, want)
    else:   # what is cut off before was not in the middle
        assert np.abs(got.astype(int) - want).max() <= 3
    np.testing.assert_array_equal(images.square(image, images.View(16, "stretch", "bilinear")),
                                  np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))
    np.testing.assert_array_equal(images.square(image, images.View(16, "stretch", channels=1))[..., 0],
                                  np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BICUBIC)))


def test_a_very_long_picture_takes_little_memory():
    """10,000 to 1: resized whole by its short side it would be 160,000 wide."""
    got = images.square(Image.new("RGB", (10_000, 1), (1, 2, 3)), images.View(16))
    assert got.shape == (16, 16, 3) and (got == (1, 2, 3)).all()


def test_training_takes_random_parts():
    """Of the image, at least the share that is asked for, mirrored in half of the cases; evaluation does not."""
    image, view = gradient(80, 40), images.View(16, min_crop_area=0.25, flip=True)
    draws = np.random.default_rng(0).random((200, 4))
    made = np.stack([images.square(image, view, d) for d in draws]).astype(float)
    shares = np.abs(made[:, 8, -1, 0] - made[:, 8, 0, 0]) / 255 * 80 / 40   # of the shorter side, but for the edges
    assert 0.4 < shares.min() < 0.6 and 0.85 < shares.max() < 1
    mirrored = made[:, 8, -1, 0] < made[:, 8, 0, 0]
    assert 70 < mirrored.sum() < 130
    assert made[..., 0].min() < 5 and made[..., 0].max() > 250   # from one end of the picture to the other
    np.testing.assert_array_equal(images.square(image, view), images.square(image, images.View(16)))


def test_without_pillow_there_is_one_line():
    code = ("import sys; sys.modules['PIL'] = None\n"
            "from fm_jax import images, errors\n"
            "try: images.decode(b'')\n"
            "except errors.UserError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "images need Pillow: pip install 'fm_jax[images]'\n", done.stderr


def test_a_run_of_pictures_from_files_to_classes(tmp_path, inline):
    """Prepared from a JSONL with paths, a damaged one left out; trained, stopped and resumed as if it had not been;
    loaded, and asked for vectors and classes, several texts for one class among them."""
    rng, records = np.random.default_rng(0), []
    for i in range(40):
        colour = rng.integers(0, 256, 3)
        (tmp_path / f"{i}.png").write_bytes(saved(Image.fromarray(np.full((9, 12, 3), colour, np.uint8))))
        records.append({"image": f"{i}.png", "text": ["reddish", "bluish"][int(colour[2] > colour[0])] + f" {i}"})
    (tmp_path / "7.png").write_bytes(b"damaged")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    code, out, err = inline("prepare", "--examples", f"--source={tmp_path}/x.jsonl", "--tokenizer=bytes",
                            "--images=image", "--validation_frac=0.3", f"--output={tmp_path}/data")
    assert code == 0 and "left out            1 whose picture cannot be read; the first: " in out, err

    def train(name, steps):
        code, out, err = inline(
            "train", "--config=configs/image_text.py:tiny", f"--workdir={tmp_path / name}",
            f"--config.data.train={tmp_path}/data", "--config.batch_size=8", "--config.accumulation_steps=2",
            f"--config.steps={steps}", "--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=0",
            "--config.eval.every=0", "--config.mesh.data=1", "--config.objective_args.min_crop_area=0.5")
        assert code == 0, err
        return fm_jax.load(tmp_path / name)

    train("a", 2)
    lm, whole = train("a", 4), train("b", 4)
    files = [tmp_path / f"{i}.png" for i in range(20) if i != 7]
    vectors = lm.embed_images(files)   # more than a batch
    np.testing.assert_allclose(vectors, whole.embed_images(files), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(lm.embed_images([files[3].read_bytes(), np.asarray(Image.open(files[4]))]), vectors[3:5],
                               atol=1e-6)
    texts = lm.embed(["red", "blue", "navy"])
    mean = texts[1:].mean(0)
    logits = vectors @ np.stack([texts[0], mean / np.linalg.norm(mean)]).T * np.exp(float(lm.params["logit_scale"]))
    want = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(lm.classify_images(files, ["red", ["blue", "navy"]]), want, atol=1e-4)
    for bad, message in ((lambda: lm.embed_images(files[0]), "give a list"),
                         (lambda: lm.classify_images(files, "red"), "give a list"),
                         (lambda: lm.embed_images([tmp_path / "7.png"]), "7.png: not an image"),
                         (lambda: lm.embed_images([tmp_path / "no.png"]), "no.png: cannot be read"),
                         (lambda: lm.generate(["x"]), "cannot continue text")):
        with pytest.raises(UserError, match=message):
            bad()
