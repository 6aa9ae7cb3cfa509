"""Tiny random generators of every family for 32 × 32 pixels, as folders in diffusers' layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ..conftest import make_tokenizer, text_settings


@pytest.fixture(scope="session")
def loaded_model(tiny_diffusion: Path) -> Any:
    from discl.spectrum.models import load_generator

    return load_generator(str(tiny_diffusion))


@pytest.fixture
def tiny_model(loaded_model: Any) -> Any:
    """The model of `tiny_diffusion`, loaded once. A test may replace its attributes."""
    return copy.copy(loaded_model)


def make_vae(channels: int = 4, **settings: Any) -> Any:
    """A VAE of factor 4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels,
        sample_size=32,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        **settings,
    )


def make_t5(folder: Path, width: int) -> tuple[Any, Any]:
    """A T5 encoder and its fast tokenizer over single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,."]
    raw = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    tokenizer = T5TokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=512, extra_ids=0
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )
    return tokenizer, T5EncoderModel(config)


def make_xl(folder: Path, refiner: bool, width: int = 32) -> Path:
    """`width` is that of the second text encoder."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    settings = text_settings(tokenizer) | {"num_hidden_layers": 2}
    torch.manual_seed(1)
    states = width if refiner else 32 + width  # of one text encoder, or of two
    numbers = 5 if refiner else 6
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=8 * numbers + width,
        cross_attention_dim=states,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    second = CLIPTextConfig(
        **settings | {"hidden_size": width, "projection_dim": width}, hidden_act="gelu"
    )
    parts = {
        "vae": make_vae(scaling_factor=0.13025),
        "unet": unet,
        "scheduler": scheduler,
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": CLIPTextModelWithProjection(second),
        "tokenizer_2": tokenizer,
    }
    if refiner:
        pipeline = StableDiffusionXLImg2ImgPipeline(
            **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
        )
    else:
        first = {"text_encoder": CLIPTextModel(CLIPTextConfig(**settings)), "tokenizer": tokenizer}
        pipeline = StableDiffusionXLPipeline(**parts | first)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL base: two text encoders, six numbers of size, and an Euler sampler like the real one."""
    return make_xl(tmp_path_factory.mktemp("tiny") / "xl", refiner=False)


@pytest.fixture(scope="session")
def tiny_refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL refiner: one text encoder, an aesthetic score."""
    return make_xl(tmp_path_factory.mktemp("tiny") / "refiner", refiner=True)


def make_sd3(folder: Path) -> Path:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    settings = text_settings(tokenizer) | {"num_hidden_layers": 2}
    torch.manual_seed(2)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    )
    t5_tokenizer, t5 = make_t5(folder.with_name(f"{folder.name}-t5"), 64)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(8, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**settings)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**settings)),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 3: two CLIPs and a T5."""
    return make_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


def make_flux(folder: Path, guidance: bool) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    torch.manual_seed(3)
    t5_tokenizer, t5 = make_t5(folder.with_name(f"{folder.name}-t5"), 32)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=make_vae(4, scaling_factor=0.36, shift_factor=0.1),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 [dev]: told the guidance scale, its grid shifted by the size of the picture."""
    return make_flux(tmp_path_factory.mktemp("tiny") / "flux", guidance=True)


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 [schnell]: no guidance at all."""
    return make_flux(tmp_path_factory.mktemp("tiny") / "schnell", guidance=False)
