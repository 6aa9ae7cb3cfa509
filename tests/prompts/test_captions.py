"""Captions by tiny models of the true architectures, compared with transformers' own generation."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import make_tokenizer
from discl.errors import CheckpointError
from discl.prompts.captions import QUESTION, Captioner, describe_captioner, find_captioner
from helpers.captioners import save_blip, save_encoder_decoder, save_git, save_llava

FAMILIES = ("blip", "git", "encoder-decoder", "llava")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("captioners")
    decoder = save_encoder_decoder(root / "encoder-decoder", make_tokenizer(root / "bytes"))
    return {
        "blip": save_blip(root / "blip"),
        "git": save_git(root / "git"),
        "encoder-decoder": decoder,
        "llava": save_llava(root / "llava"),
    }


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Five pictures of different sizes: smooth shades, so that the models' captions differ."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (2, 2, 3)).astype(np.uint8)) for _ in range(5)
    ]
    return [picture.resize((32 + 8 * number, 40)) for number, picture in enumerate(pictures)]


def by_transformers(
    folder: Path, family: str, image: Image.Image, prompt: str | None, tokens: int
) -> str:
    """The caption of one image, alone, by the library's own classes."""
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    if family == "encoder-decoder":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(
            images=image, return_tensors="pt"
        ).pixel_values
        output = model.generate(pixel_values=pixels, max_new_tokens=tokens, do_sample=False)
        return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    if family == "llava":
        inputs = processor(
            images=image, text=f"user: <image>{prompt or QUESTION} assistant:", return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
    elif prompt is not None:
        output = model.generate(
            **processor(images=image, text=prompt, return_tensors="pt"),
            max_new_tokens=tokens,
            do_sample=False,
        )
    else:
        output = model.generate(
            pixel_values=processor(images=image, return_tensors="pt").pixel_values,
            max_new_tokens=tokens,
            do_sample=False,
        )
    return " ".join(processor.tokenizer.decode(output[0], skip_special_tokens=True).split())


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_those_of_transformers_whatever_shares_the_batch(
    folders: dict[str, Path], images: list[Image.Image], family: str
) -> None:
    captions = Captioner(str(folders[family]), max_new_tokens=6, batch=2)(images)
    assert captions == [
        by_transformers(folders[family], family, image, None, 6) for image in images
    ]
    assert all(captions)
    assert captions == Captioner(str(folders[family]), max_new_tokens=6, batch=4)(images)
    assert Captioner(str(folders[family]), max_new_tokens=6, batch=2)(images[3:4]) == captions[3:4]


@pytest.mark.parametrize("family", ["blip", "llava"])
def test_a_prompt_is_completed_or_answered_and_not_repeated(
    folders: dict[str, Path], images: list[Image.Image], family: str
) -> None:
    caption = Captioner(str(folders[family]), "a photo of", max_new_tokens=5)(images[:1])[0]
    whole = by_transformers(folders[family], family, images[0], "a photo of", 5)
    assert caption and not caption.startswith("a photo of")
    assert whole.replace(" ", "").endswith(caption.replace(" ", "").replace("##", ""))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_no_part_of_the_caption(
    folders: dict[str, Path], images: list[Image.Image], family: str
) -> None:
    captions = Captioner(str(folders[family]), "zebra", max_new_tokens=3)(images)
    assert not any("zebra" in caption.replace(" ", "") for caption in captions)
    assert all(len(caption.replace(" ", "")) <= 6 for caption in captions)


def test_a_model_that_chats_gets_the_picture_of_each_text(
    folders: dict[str, Path], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Idefics and SmolVLM want it, which take a flat list for pictures of one text."""
    captioner, given = Captioner(str(folders["llava"]), max_new_tokens=2, batch=2), []
    both = captioner.both

    class Told:
        def __call__(self, **inputs: Any) -> Any:
            given.append([len(each) for each in inputs["images"]])
            return both(**inputs)

        def __getattr__(self, name: str) -> Any:
            return getattr(both, name)

    monkeypatch.setattr(captioner, "both", Told())
    captioner(images[:3])
    assert given == [[1, 1], [1, 1]]


def test_everything_that_changes_a_caption_changes_its_key(folders: dict[str, Path]) -> None:
    keys = {
        describe_captioner(str(folders[family]), prompt, tokens, dtype)
        for family in ("blip", "git")
        for prompt in (None, "a")
        for tokens in (5, 6)
        for dtype in ("float32", "bfloat16")
    }
    assert len(keys) == 16
    assert describe_captioner(str(folders["blip"]), None, 5, "float32") in keys


def test_what_is_no_captioner_is_refused(
    tiny_clip: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError,
        match="family 'clip'",
    ):
        Captioner(str(tiny_clip))
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        Captioner(str(tmp_path / "none"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in folders["blip"].iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds only pickled weights"):
        Captioner(str(pickled))
    folder = Path(shutil.copytree(folders["blip"], tmp_path / "mute"))
    for file in folder.glob("*vocab*"):
        file.unlink()
    (folder / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"mute' .* tokenizer\.json"):
        find_captioner(str(folder))


def test_a_captioner_that_lacks_weights_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["git"], tmp_path / "git"))
    state = load_file(folder / "model.safetensors")
    gone = next(name for name in state if "image_encoder" in name)
    save_file(
        {name: tensor for name, tensor in state.items() if name != gone},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=re.escape(f"has no {gone}: 1 ")):
        Captioner(str(folder))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('touched') }}",
        "{{ messages.append(1) }}",
        "{% for",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_runs_no_code(
    template: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to the checkpoint, and is rendered in a sandbox."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(folders["llava"], tmp_path / "llava")
    for file in [*folder.glob("*.jinja"), *folder.glob("*.json")]:
        if file.suffix == ".jinja":
            file.write_text(template)
        elif "chat_template" in (told := json.loads(file.read_text())):
            file.write_text(json.dumps({**told, "chat_template": template}))
    captioner = Captioner(str(folder), max_new_tokens=2, batch=1)
    with pytest.raises(CheckpointError, match="chat template"):
        captioner([Image.new("RGB", (32, 32))])
    assert not (tmp_path / "touched").exists()
