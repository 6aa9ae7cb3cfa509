"""Tiny randomly initialised image-to-text models of the true architectures, written as folders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**LAYERS, "image_size": 32, "patch_size": 8}
CHAT = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %} assistant:"
)


def make_letters(folder: Path) -> Any:
    """A BERT tokenizer of single letters."""
    from transformers import BertTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    folder.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text(
        "\n".join([*special, *letters, *(f"##{letter}" for letter in letters)])
    )
    return BertTokenizer(str(folder / "vocab.txt"), model_max_length=64)


def save_blip(folder: Path) -> Path:
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    tokenizer = make_letters(folder.with_name(f"{folder.name}-letters"))
    text = {
        **LAYERS,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
        "bos_token_id": 5,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=VISION, projection_dim=32)
    ).save_pretrained(folder)
    BlipProcessor(
        BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer
    ).save_pretrained(folder)
    return folder


def save_git(folder: Path) -> Path:
    from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = make_letters(folder.with_name(f"{folder.name}-letters"))
    torch.manual_seed(0)
    GitForCausalLM(
        GitConfig(
            vision_config=VISION,
            **LAYERS,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    GitProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
    ).save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path, tokenizer: Any) -> Path:
    """ViT and GPT-2, with separate processors of images and of texts, as in such folders."""
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    text = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), text)
    )
    model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """A model that chats."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_letters(folder.with_name(f"{folder.name}-letters"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = LlamaConfig(
        **LAYERS,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_id=len(tokenizer) - 1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder
