"""Hugging Face folders of models of images: against what transformers computed (`tests/peers/make_hf_models.py`)."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import hf
from fm_jax.errors import UserError
from fm_jax.tokenizer import ByteTokenizer
from hf_test import read_safetensors

MODELS = pathlib.Path(__file__).parent / "hf_models"


def settings(folder, name="config.json", **changes):
    """Returns the object in a file of a folder, with changes, written back."""
    value = json.loads((folder / name).read_text())
    for key, change in changes.items():
        *sections, leaf = key.split("__")
        inside = value
        for section in sections:
            inside = inside[section]
        inside[leaf] = change
    (folder / name).write_text(json.dumps(value))
    return value


@pytest.fixture
def there(tmp_path):
    """Returns a function: name of a model -> a copy of its folder, with a tokenizer where it reads texts."""
    def copy(name):
        folder = shutil.copytree(MODELS / name, tmp_path / name)
        if name != "vit":
            ByteTokenizer().save(folder)   # its vocabulary is another, and ids are given below
        return folder
    return copy


def opened(folder):
    """Returns (config, objective, parameters) without the tokenizer."""
    from fm_jax import pretrained

    found = hf.open_folder(folder)
    config = hf.read_config(found)
    objective, abstract, _ = pretrained._abstract(config, None, None)
    return config, objective, hf.read_params(found, abstract)


@pytest.mark.parametrize("name", ["clip", "clip_old", "siglip", "vit"])
def test_a_family_is_what_transformers_computes(name, there, tmp_path):
    """The same hidden states of both towers, vectors and logits, of padded texts, and of larger images, for which
    positions are interpolated; and exported, the same settings and the same bytes under the same keys."""
    folder = there(name)
    want, (config, objective, params) = np.load(folder / "expected.npz"), opened(folder)
    close = lambda got, wanted: np.testing.assert_allclose(got, want[wanted], atol=2e-4, err_msg=wanted)
    assert np.abs(want["logits"]).max() > 1
    if name == "vit":
        close(objective.hidden_image(params, want["images"])[0], "image_hidden")
        close(objective.embed_image(params, want["images"]), "image_vectors")
        close(objective.classify(params, want["images"]), "logits")
        close(objective.classify(params, want["large"] / np.float32(255)), "large_logits")
    else:
        tower = lambda *inputs, method: objective.module.apply({"params": params}, *inputs, method=method)
        pixels = (want["images"] / 255 - [.4, .5, .6]) / [.3, .2, .25]
        image, hidden, _ = tower(pixels.astype(np.float32), method="embed_image")
        length = np.full(2, 11) if name == "siglip" else want["length"]   # which sees what is behind a text
        text, text_hidden, _ = tower(want["tokens"], length, method="embed_text")
        close(hidden, "image_hidden")
        close(text_hidden, "text_hidden")
        close(image, "image_vectors")
        close(objective.embed_image(params, want["images"]), "image_vectors")
        close(text, "text_vectors")
        close(objective.similarity(params, image, text), "logits")
        close(objective.similarity(params, objective.embed_image(params, want["large"]), text), "large_logits")
    hf.save(tmp_path / "back", config, jax.tree.map(np.asarray, params), None)
    assert read_safetensors(tmp_path / "back" / "model.safetensors") == read_safetensors(folder / "model.safetensors")
    both = hf.open_folder(folder), hf.open_folder(tmp_path / "back")
    assert hf.model_of(both[0].settings, "") == hf.model_of(both[1].settings, "")
    for file in ("config.json", "preprocessor_config.json"):
        one, other = (settings(side, file) for side in (folder, tmp_path / "back"))
        same = ("model_type", "architectures", "size", "crop_size", "resample", "image_mean", "image_std")
        assert {k: one.get(k) for k in same} == {k: other.get(k) for k in same}


@pytest.mark.parametrize("name, model_type", [("clip", "clip_vision_model"), ("siglip", "siglip_vision_model"),
                                              ("vit", "vit")])
def test_a_tower_of_images_alone(name, model_type, there, tmp_path):
    """Cut out of its model's files: the same vectors."""
    folder, want = there(name), np.load(MODELS / name / "expected.npz")
    whole = hf.open_folder(folder)
    own = settings(folder)
    own = {"model_type": model_type, **own.get("vision_config", own)} | {
        "model_type": model_type, "architectures": [{
            "vit": "ViTModel", "clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}[name]]}
    (folder / "config.json").write_text(json.dumps(own))
    tensors = {key.removeprefix("vit."): np.array(e.read()) for key, e in whole.entries.items()
               if key.startswith(("vision_model.", "vit."))}
    hf.safetensors.write(folder / "model.safetensors", [
        (key, a.dtype, a.shape, lambda a=a: a) for key, a in tensors.items()])
    config, objective, params = opened(folder)
    hidden = objective.hidden_image(params, want["images"])[0]
    np.testing.assert_allclose(hidden, want["image_hidden"], atol=2e-4)
    if name != "clip":   # whose vector is projected in the whole model
        vector = np.asarray(objective.embed_image(params, want["images"]))
        unit = vector / np.linalg.norm(vector, axis=1, keepdims=True) if name == "siglip" else vector
        np.testing.assert_allclose(unit, want["image_vectors"], atol=2e-4)
    hf.save(tmp_path / "back", config, jax.tree.map(np.asarray, params), None)
    assert read_safetensors(tmp_path / "back" / "model.safetensors") == read_safetensors(folder / "model.safetensors")
    with pytest.raises(UserError, match="num_classes=0"):
        objective.loss(params, objective.random_batch(2, np.random.default_rng(0)))


def test_preparing_of_images_that_differs_is_an_error(there):
    folder = there("clip")
    read = lambda: hf.read_config(hf.open_folder(folder)).objective_args
    assert (read().image_size, read().resize, read().filter, read().mean) == (17, "crop", "bicubic", (0.4, 0.5, 0.6))
    file = "preprocessor_config.json"
    settings(folder, file, size=17, crop_size=17)   # as older files have it
    assert (read().image_size, read().resize) == (17, "crop")
    for changes, message in (({"size": {"shortest_edge": 20}}, "crop_size=17"), ({"resample": 1}, "unknown 'lanczos'"),
                             ({"resample": 3, "do_rescale": False}, "do_rescale=False"),
                             ({"do_rescale": True, "size": {"shortest_edge": 17}, "rescale_factor": 1.0}, "rescale_f"),
                             ({"rescale_factor": 1 / 255, "resize_mode": 1}, "resize_mode=1")):
        settings(folder, file, **changes)
        with pytest.raises(UserError, match=f"{message}"):
            read()
    (folder / file).unlink()
    assert read().image_size == 17 and read().std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    settings(folder, vision_config__image_size=3)
    with pytest.raises(UserError, match="patch_size=5: expected whole numbers"):
        read()


@pytest.mark.parametrize("name", ["clip", "siglip", "vit"])
def test_transformers_opens_what_is_exported(name, there, tmp_path):
    """With the tokenizer's ids; and its logits are those of `Pretrained`, of texts and files of pictures."""
    torch = pytest.importorskip("torch", reason="transformers computes with PyTorch, which is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder, rng = there(name), np.random.default_rng(0)
    config, objective, params = opened(folder)
    if name != "vit":   # room for the bytes of a text
        config.model.vocab_size = 300
    tokenizer = None if name == "vit" else ByteTokenizer()
    params = jax.tree.map(np.asarray, params)
    if name != "vit":
        params["text"]["embed"]["tokens"] = rng.normal(size=(300, 20)).astype(np.float32)
    hf.save(tmp_path / "out", config, params, tokenizer)
    lm = fm_jax.load(tmp_path / "out")
    model = transformers.AutoModelForImageClassification if name == "vit" else transformers.AutoModel
    theirs = model.from_pretrained(tmp_path / "out")
    images = rng.integers(0, 256, (3, 17, 17, 3), dtype=np.uint8)
    pixels = torch.tensor((images / 255 - [.4, .5, .6]) / [.3, .2, .25]).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        if name == "vit":
            want = theirs(pixels).logits.softmax(-1)
            got = lm.classify_images(list(images))
        else:
            texts = ["a cat", "two"]
            ids = [lm.objective.text_ids([t])[0] for t in texts]
            tokens = np.array([np.pad(i, (0, 11 - len(i)), constant_values=tokenizer.pad_id) for i in ids])
            want = theirs(input_ids=torch.tensor(tokens).long(), pixel_values=pixels).logits_per_image.softmax(-1)
            got = lm.classify_images(list(images), texts)
    np.testing.assert_allclose(got, want.numpy(), atol=2e-4)
    assert np.ptp(got, axis=0).max() > 0.01
