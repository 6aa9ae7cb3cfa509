"""The filter against a CLIPModel's own forward pass, and its verdicts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from discl.errors import CheckpointError
from discl.spectrum.clip_filter import (
    ClipScorer,
    Verdict,
    describe_scorer,
    find_clip,
    judge,
    judge_difficulty,
)

TEXTS = {4: "a photo of a hat", 0: "a photo of a bag", 2: "a photo of boots"}
LABELS = [0, 2, 4, 4, 0, 2, 2]


def make_images() -> list[Image.Image]:
    """Noise of several sizes, none of them a square of 32 but the first."""
    generator = np.random.default_rng(0)
    sizes = [(32, 32), (40, 30), (30, 40), (64, 64), (20, 20), (33, 90), (32, 32)]
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3)).astype(np.uint8))
        for width, height in sizes
    ]


@pytest.fixture(scope="module")
def scorer(tiny_clip: Path) -> ClipScorer:
    return ClipScorer(str(tiny_clip), TEXTS)


@pytest.mark.parametrize(
    ("clip_similarity", "threshold", "verdict"),
    [
        (0.31, 0.3, Verdict(True)),
        (0.3, 0.3, Verdict(True)),
        (0.2991, 0.3, Verdict(False, "clip_similarity 0.299 < 0.3")),
        (-0.125, 0.25, Verdict(False, "clip_similarity -0.125 < 0.25")),
        (-1.0, -1.0, Verdict(True)),
        (float("nan"), -1.0, Verdict(False, "clip_similarity nan < -1")),
    ],
)
def test_keep_or_drop_with_its_reason(
    clip_similarity: float, threshold: float, verdict: Verdict
) -> None:
    assert judge(clip_similarity, threshold) == verdict


@torch.inference_mode()
@pytest.mark.parametrize(
    ("probability", "reason"),
    [(0.1, ""), (0.9, ""), (float("nan"), ""), (0.09, "too hard: "), (0.91, "too easy: ")],
)
def test_bounds_of_the_band_are_kept(probability: float, reason: str) -> None:
    verdict = judge_difficulty(probability, (0.1, 0.9))
    assert verdict.keep == (not reason) and verdict.reason.startswith(reason)


def test_cosines_are_those_of_a_forward_pass(scorer: ClipScorer, tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = (
        CLIPModel.from_pretrained(tiny_clip).eval(),
        CLIPProcessor.from_pretrained(tiny_clip),
    )
    expected = []
    for image, label in zip(make_images(), LABELS, strict=True):
        output = model(
            **processor(
                text=[TEXTS[label]],
                images=[image],
                return_tensors="pt",
                padding="max_length",
                max_length=16,
            )
        )
        expected.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).item())
    cosines = scorer(make_images(), LABELS)
    assert cosines.dtype == np.float32
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(cosines, expected, atol=2e-6)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_the_processor(scorer: ClipScorer, mode: str) -> None:
    for image in make_images():
        wanted = scorer.processor(images=image.convert(mode), return_tensors="pt")["pixel_values"]
        assert torch.equal(scorer._prepare(image.convert(mode)), wanted)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_batch_size_does_not_matter(batch: int, scorer: ClipScorer, tiny_clip: Path) -> None:
    other = ClipScorer(str(tiny_clip), TEXTS, batch=batch)
    np.testing.assert_allclose(
        other(make_images(), LABELS), scorer(make_images(), LABELS), atol=1e-6
    )


def test_company_does_not_change_a_bit(scorer: ClipScorer) -> None:
    together = scorer(make_images(), LABELS)
    for row, (image, label) in enumerate(zip(make_images(), LABELS, strict=True)):
        assert scorer([image], [label])[0] == together[row]


def test_an_image_is_compared_with_the_text_of_its_own_label(scorer: ClipScorer) -> None:
    image = make_images()[1]
    one_by_one = [scorer([image], [label])[0] for label in TEXTS]
    np.testing.assert_allclose(scorer([image] * 3, list(TEXTS)), one_by_one, atol=1e-6)
    assert len({round(float(cosine), 5) for cosine in one_by_one}) == 3


def test_no_image_no_score(scorer: ClipScorer) -> None:
    assert scorer([], []).shape == (0,)


def test_a_score_is_valid_only_for_its_clip_and_its_texts(tiny_clip: Path, tmp_path: Path) -> None:
    known = describe_scorer(str(tiny_clip), TEXTS)
    assert describe_scorer(str(tiny_clip), dict(sorted(TEXTS.items()))) == known
    assert describe_scorer(str(tiny_clip), {**TEXTS, 4: "a hat"}) != known
    copied = shutil.copytree(tiny_clip, tmp_path / "elsewhere")
    assert describe_scorer(str(copied), TEXTS) == known
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    other = shutil.copytree(tiny_clip, tmp_path / "other")
    (other / "model.safetensors").write_bytes(weights)
    assert describe_scorer(str(other), TEXTS) != known


def test_a_folder_that_is_no_clip(tiny_clip: Path, tiny_diffusion: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"no CLIP folder in transformers' format: it has no .*preprocessor_config\.json",
    ):
        ClipScorer(str(tiny_diffusion), TEXTS)
    broken = shutil.copytree(tiny_clip, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded as a CLIP"):
        ClipScorer(str(broken), TEXTS)
    pickled = shutil.copytree(tiny_clip, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        ClipScorer(str(pickled), TEXTS)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["tokenizer.json", "vocab.json", "merges.txt"], r"neither tokenizer\.json nor"),
        (["tokenizer.json", "merges.txt"], r"no merges\.txt"),
        (["tokenizer_config.json"], r"no tokenizer_config\.json"),
    ],
)
def test_a_clip_without_its_tokenizer_is_told_before_anything_is_loaded(
    names: list[str], words: str, tiny_clip: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=words):
        find_clip(str(folder))


def test_a_clip_that_lacks_weights_is_told(tiny_clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if "text_projection" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        CheckpointError,
        match=r"has no text_projection\.weight: 1 ",
    ):
        ClipScorer(str(folder), TEXTS)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is missing or not"):
        find_clip(str(folder))


def test_a_scorer_without_texts_embeds_images(tiny_clip):
    picture = Image.new("RGB", (32, 32), "red")
    alone = ClipScorer(str(tiny_clip), {}).embed([picture])
    assert np.array_equal(alone, ClipScorer(str(tiny_clip), {0: "a bag"}).embed([picture]))
