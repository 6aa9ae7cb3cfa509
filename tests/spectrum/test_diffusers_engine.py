"""Checkpoints that the engine does not know, through diffusers' pipelines: here an LCM."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from discl.errors import CheckpointError
from discl.pipeline import run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.spectrum.diffusers_engine import PlainEngine, strength_of
from discl.spectrum.models import check_generator, describe_generator, load_generator, load_plain
from discl.spectrum.plan import Request
from discl.utils.hashing import derive_seed

REQUEST = Request("id", "image", "digest", 0, 50, 0, 0, "a grey shirt", "", 32, 32)


@pytest.fixture(scope="module")
def consistency(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion with LCM's sampler and a UNet that takes the guidance scale."""
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tiny_diffusion)
    torch.manual_seed(5)
    unet = diffusers.UNet2DConditionModel.from_config(
        dict(plain.unet.config) | {"time_cond_proj_dim": 16}
    )
    folder = tmp_path_factory.mktemp("tiny") / "consistency"
    diffusers.LatentConsistencyModelPipeline(
        vae=plain.vae,
        text_encoder=plain.text_encoder,
        tokenizer=plain.tokenizer,
        unet=unet,
        scheduler=diffusers.LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def pixels_of(source: str) -> np.ndarray:
    return np.random.default_rng(derive_seed(source)).integers(
        256, size=(32, 32, 3), dtype=np.uint8
    )


def test_pictures_are_those_of_diffusers(consistency: Path) -> None:
    engine = PlainEngine(load_plain(str(consistency)), num_inference_steps=4, guidance_scale=6.0)
    made = {
        request.level: picture
        for request, picture in engine.generate([REQUEST, replace(REQUEST, level=0)], pixels_of)
    }
    common = {
        "prompt": "a grey shirt",
        "num_inference_steps": 4,
        "guidance_scale": 6.0,
        "output_type": "np",
    }
    seed = derive_seed("noise", "image", 0, 0)
    picture = Image.fromarray(pixels_of("image"))
    image = diffusers.LatentConsistencyModelImg2ImgPipeline.from_pretrained(consistency)
    wanted = image(
        image=picture, strength=0.5, generator=torch.Generator().manual_seed(seed), **common
    ).images[0]
    assert np.abs(made[50].astype(int) - (wanted * 255).round()).max() <= 1
    text = diffusers.LatentConsistencyModelPipeline.from_pretrained(consistency)
    wanted = text(
        height=32, width=32, generator=torch.Generator().manual_seed(seed), **common
    ).images[0]
    assert np.abs(made[0].astype(int) - (wanted * 255).round()).max() <= 1
    assert (engine.work.unet_rows, engine.work.vae_encodes, engine.work.vae_decodes) == (
        2 * (2 + 4),
        1,
        2,
    )
    assert engine.rows_per_second(32, 32) > 0 and engine.work.vae_decodes == 2


def test_description_and_limits(consistency: Path) -> None:
    found = describe_generator(str(consistency))
    assert (found.family, found.plain, found.size, found.multiple) == (
        "LatentConsistencyModelPipeline",
        True,
        32,
        4,
    )
    check_generator(str(consistency), 4, 32, [0])
    for options in ({"fixed": True}, {"guidance_interval": (0.4, 1.0)}):
        with pytest.raises(CheckpointError) as raised:
            check_generator(str(consistency), 4, **options)  # type: ignore[arg-type]
        assert raised.value.argument == next(iter(options))
    with pytest.raises(CheckpointError, match="which the engine does not know"):
        load_generator(str(consistency))


class Pipeline:
    """Takes what a pipeline of this kind takes, and gives a picture of `size` pixels a side."""

    def __init__(
        self, size: int = 32, built_in: bool | None = None, error: Exception | None = None
    ) -> None:
        self.size, self.error, self.told = size, error, {}
        if built_in is not None:
            self.transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=built_in))

    def make(self, **told: Any) -> Any:
        self.told = told
        if self.error is not None:
            raise self.error
        return SimpleNamespace(images=[np.zeros((self.size, self.size, 3), np.float32)])


class TrueGuidance(Pipeline):
    def __call__(
        self,
        prompt: str,
        image: Any = None,
        strength: float = 0.5,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        true_cfg_scale: float = 4.0,
        negative_prompt: str | None = None,
    ) -> Any:
        return self.make(guidance_scale=guidance_scale, true_cfg_scale=true_cfg_scale)


class NoNegative(Pipeline):
    def __call__(
        self, prompt: str, image: Any = None, strength: float = 0.5, num_inference_steps: int = 50
    ) -> Any:
        return self.make()


def plain_engine(pipeline: Any) -> PlainEngine:
    return PlainEngine((pipeline, pipeline), num_inference_steps=4, guidance_scale=6.0)


def test_the_guidance_scale_goes_where_the_pipeline_is_guided() -> None:
    pipeline = TrueGuidance(built_in=False)
    list(plain_engine(pipeline).generate([REQUEST], pixels_of))
    assert pipeline.told == {"guidance_scale": None, "true_cfg_scale": 6.0}
    pipeline = TrueGuidance(built_in=True)
    list(plain_engine(pipeline).generate([REQUEST], pixels_of))
    assert pipeline.told == {"guidance_scale": 6.0, "true_cfg_scale": 4.0}
    assert plain_engine(pipeline).unused() == []
    assert plain_engine(NoNegative()).unused() == ["negative_prompt", "guidance_scale"]


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        (
            TrueGuidance(error=ValueError("divisible by 16")),
            "makes no image of source 'image' at level 50 %: divisible by 16",
        ),
        (
            TrueGuidance(error=torch.OutOfMemoryError("full")),
            "out of memory with a single image in TrueGuidance",
        ),
        (TrueGuidance(size=16), "16 × 16 pixels instead of 32 × 32"),
    ],
)
def test_what_a_pipeline_fails_with_is_told(pipeline: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        list(plain_engine(pipeline).generate([REQUEST], pixels_of))


def test_a_size_that_the_files_do_not_tell_is_asked_for(consistency: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(consistency, tmp_path / "other"))
    settings = json.loads((folder / "vae" / "config.json").read_text())
    del settings["block_out_channels"]
    (folder / "vae" / "config.json").write_text(json.dumps(settings))
    assert describe_generator(str(folder)).size is None
    with pytest.raises(CheckpointError) as raised:
        check_generator(str(folder), 4)
    assert raised.value.argument == "size"
    check_generator(str(folder), 4, 32)


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableVideoDiffusionPipeline",
        "None",
    ],
)
def test_pipelines_that_want_more_are_refused(consistency: Path, kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(consistency, tmp_path / "other"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    with pytest.raises(CheckpointError, match=rf"is a {kind}, which is not supported"):
        check_generator(str(folder), 4)


@pytest.mark.parametrize("kind", ["QwenImageEditPipeline", "Flux2Pipeline"])
def test_pipelines_that_take_no_share_of_noise_are_refused(
    consistency: Path, kind: str, tmp_path: Path
) -> None:
    """They edit an image as their prompt says, which is no level."""
    folder = Path(shutil.copytree(consistency, tmp_path / "other"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    with pytest.raises(CheckpointError, match=rf"is a {kind}\. .* takes no strength"):
        check_generator(str(folder), 4)


@pytest.mark.parametrize("total", [4, 20, 30, 50])
@pytest.mark.parametrize(
    "kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline"]
)
def test_strength_gives_the_steps_asked_for(
    kind: str, total: int, request: pytest.FixtureRequest
) -> None:
    """The first rounds T · s down, the second T − T · s."""
    folder = request.getfixturevalue(
        "tiny_diffusion" if kind == "StableDiffusionImg2ImgPipeline" else "tiny_sd3"
    )
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.scheduler.set_timesteps(total)
    for steps in range(1, total + 1):
        taken = pipeline.get_timesteps(total, strength_of(pipeline, steps, total), "cpu")
        assert len(taken[0]) == taken[1] == steps


def test_a_run_goes_the_plain_way_and_says_so(
    consistency: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        for name in ("boot", "hat"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(2):
                picture = pixels_of(f"{split}{name}{index}")
                Image.fromarray(picture).save(tmp_path / "data" / split / name / f"{index}.png")
    recipe = validate(
        {
            "name": "plain",
            "data": {"root": str(tmp_path / "data")},
            "filter": {"checkpoint": str(tiny_clip)},
            "methods": {"ce": {}},
            "spectrum": {
                "checkpoint": str(consistency),
                "levels": [0, 50],
                "seeds": 1,
                "num_inference_steps": 4,
            },
            "train": {"batch_size": 4},
            "runtime": {"device": "cpu"},
        }
    )
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "generate")
    output = capsys.readouterr()
    assert (output.out + output.err).replace("\n", " ").count(
        "does not know a LatentConsistencyModelPipeline"
    ) == 1
    rows = [
        row
        for shard in (tmp_path / "run").glob("spectrum/part-*.parquet")
        for row in pq.read_table(shard).to_pylist()
    ]
    assert len(rows) == 8 and all(
        Image.open(io.BytesIO(row["image"]["bytes"])).size == (32, 32) for row in rows
    )
