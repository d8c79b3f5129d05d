"""Images of files as square arrays of pixels: decoding, cropping, resizing, on the host. Layer 1.

    python -c "from fm_jax import images; print(images.decode(open('x.png', 'rb').read()).size)"

Pillow decodes and resizes: what published models were trained on was resized by it.
"""

import dataclasses
import io
import warnings

from absl import logging
import numpy as np

from fm_jax.architecture import Architecture
from fm_jax.errors import UserError, choose
from fm_jax.sharding import Layout

FILTERS = ("bicubic", "bilinear")
MOST_PIXELS = 50_000_000   # of an image: 150 MB decoded
MOST_ELONGATED = 8         # more of the long side than so many times the short one is cut off before resizing


@dataclasses.dataclass(frozen=True)
class View:
    """How an image becomes size x size pixels. Fields are arguments of the objectives.

    resize: "crop": the middle square of the image; "stretch": the whole image, whatever its shape.
    filter: bicubic or bilinear, smoothed where the image gets smaller.
    channels: 3, or 1 for grey.
    min_crop_area: in training, a random part of this share of the area or more is taken; 1: off.
    flip: in training, left and right are exchanged in half of the images.
    """

    size: int
    resize: str = "crop"
    filter: str = "bicubic"
    channels: int = 3
    min_crop_area: float = 1.0
    flip: bool = False

    def __post_init__(self):
        choose(self.resize, ("crop", "stretch"), "config.objective_args.resize")
        choose(self.filter, FILTERS, "config.objective_args.filter")
        if not 0 < self.min_crop_area <= 1:
            raise UserError(f"config.objective_args.min_crop_area={self.min_crop_area} is a share of the image: above "
                            "0 and at most 1")
        if self.size < 1:
            raise UserError(f"config.objective_args.image_size={self.size} must be positive")


def pillow():
    """Returns Pillow, with what is used of it here. Raises UserError where it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise UserError("images need Pillow: pip install 'fm_jax[images]'") from None
    return PIL


def decode(image, place: str = "image"):
    """Returns a Pillow image, RGB or grey ("L"), of the bytes of a file (PNG, JPEG, ...) or of an array of pixels.

    Transparent parts are white; of an animation, the first picture; turned as its camera says. An array is uint8
    [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. `place`: what an error calls it.

    Raises:
      UserError: not an image, a damaged one, or one of more than MOST_PIXELS.
    """
    pil, unknown = pillow(), pillow().UnidentifiedImageError
    module = pil.Image
    try:
        if isinstance(image, (bytes, bytearray, memoryview)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")   # of size: it is checked here; of odd metadata
                opened = module.open(io.BytesIO(image))
                if opened.width * opened.height > MOST_PIXELS:
                    raise UserError(f"{opened.width} x {opened.height} pixels are more than {MOST_PIXELS:,}")
                opened = pil.ImageOps.exif_transpose(opened)
        else:
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size or (
                    image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
                raise UserError(f"an array {image.dtype}{list(image.shape)}; expected uint8 [H, W] or [H, W, channels]")
            opened = module.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
        if opened.mode.startswith("I"):   # 16 bits, which Pillow would cut off at 255
            return module.fromarray((np.asarray(opened).clip(0, 2 ** 16 - 1) // 256).astype(np.uint8))
        if opened.has_transparency_data:
            opened = opened.convert("RGBA")
            return module.alpha_composite(module.new("RGBA", opened.size, "white"), opened).convert("RGB")
        return opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    except UserError as e:
        raise UserError(f"{place}: {e}") from None
    except unknown:
        raise UserError(f"{place}: not an image that can be read, of no format that Pillow knows") from None
    except Exception as e:   # decoders raise what they like on damaged files: OSError, SyntaxError, struct.error, ...
        raise UserError(f"{place}: not an image that can be read ({type(e).__name__}: {e})") from None


def square(image, view: View, draws: np.ndarray | None = None) -> np.ndarray:
    """Returns uint8 [size, size, channels] of a Pillow image.

    draws: 4 numbers in [0, 1), with which it is cropped and flipped as in training; None: as in evaluation.
    """
    module = pillow().Image
    image = image.convert("RGB" if view.channels == 3 else "L")
    filter_ = {"bicubic": module.Resampling.BICUBIC, "bilinear": module.Resampling.BILINEAR}[view.filter]
    size, (width, height) = view.size, image.size
    if draws is not None and (view.min_crop_area < 1 or view.flip):
        if view.resize == "crop":
            width = height = min(width, height)
        share = (view.min_crop_area + (1 - view.min_crop_area) * draws[0]) ** 0.5
        width, height = max(width * share, 1), max(height * share, 1)
        left, top = (image.width - width) * draws[1], (image.height - height) * draws[2]
        image = image.resize((size, size), filter_, box=(left, top, left + width, top + height))
        if view.flip and draws[3] < 0.5:
            image = image.transpose(module.Transpose.FLIP_LEFT_RIGHT)
    elif view.resize == "stretch":
        image = image.resize((size, size), filter_)
    else:   # resized whole and then cropped, as others do: pixels at the edges depend on those beyond
        short = min(width, height)
        kept = [min(side, MOST_ELONGATED * short) for side in (width, height)]
        box = [(side - k) // 2 for side, k in zip((width, height), kept)]
        image = image.crop((*box, box[0] + kept[0], box[1] + kept[1]))
        image = image.resize([size if side == short else int(size * side / short) for side in kept], filter_)
        left, top = ((side - size) // 2 for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).reshape(size, size, view.channels)


def into(pixels: np.ndarray, data, place: str, view: View, draws: np.ndarray | None) -> float:
    """Returns the weight of an example, 1, having written its image to `pixels`; 0 where it cannot be read.

    A run does not end for a damaged image: what cannot be read is counted when data is prepared, and logged here.
    """
    try:
        pixels[:] = square(decode(data, place), view, draws)
    except UserError as error:
        logging.warning("left out: %s", error)
        return 0.0
    return 1.0


def check_tower(arch: Architecture, view: View, mean, std, layout: Layout | None, section: str):
    """Returns (mean, std), tuples of a number for each channel, for a tower of images of `config`'s `section`.

    Raises:
      UserError: no patches in the architecture, a mesh that cuts what is not cut here, or numbers that do not fit.
    """
    if not arch.patch_size or arch.pooling not in ("first", "mean", "attention"):
        raise UserError(f"config.{section}.patch_size={arch.patch_size}, pooling={arch.pooling!r}: a tower of images "
                        "needs a patch_size, and pooling 'first', 'mean' or 'attention'")
    if view.size < arch.patch_size:
        raise UserError(f"config.objective_args.image_size={view.size} is below config.{section}.patch_size="
                        f"{arch.patch_size}")
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (tuple, list)) or len(values) != arch.channels or not all(
                isinstance(v, (int, float)) and (name == "mean" or v > 0) for v in values):
            raise UserError(f"config.objective_args.{name}={values!r}: expected a number for each of the "
                            f"{arch.channels} channels")
    for axis in ("context", "stage"):
        if layout is not None and layout.mesh.shape[axis] > 1:
            raise UserError(f"mesh.{axis}={layout.mesh.shape[axis]} is for sequences of tokens; train towers of images "
                            "on data, fsdp and tensor")
    return tuple(map(float, mean)), tuple(map(float, std))
