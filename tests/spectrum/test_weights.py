"""Weights from elsewhere than a folder: LoRA files, single files in the original layout."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from discl.errors import CheckpointError
from discl.spectrum.models import (
    Address,
    check_generator,
    describe_generator,
    describe_loras,
    load_generator,
)
from discl.spectrum.models.families import find_family

from .conftest import make_xl


def make_lora(folder: Path, family: Path, kind: str, *parts: str) -> Path:
    """Random LoRA weights of a network's or text encoder's attention, as diffusers saves them."""
    getattr(diffusers, kind).save_lora_weights(folder, **lora_states(family, kind, parts))
    return folder / "pytorch_lora_weights.safetensors"


@cache
def lora_states(family: Path, kind: str, parts: tuple[str, ...]) -> dict[str, Any]:
    pipeline, states = getattr(diffusers, kind).from_pretrained(family), {}
    torch.manual_seed(7)
    for part in parts:
        network, layers = (
            getattr(pipeline, part),
            ["q_proj", "v_proj"] if part.startswith("text") else ["to_q", "to_v"],
        )
        network.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights="gaussian")
        )
        state = {
            name: torch.randn_like(tensor) * 0.3
            for name, tensor in peft.get_peft_model_state_dict(network).items()
        }
        states[f"{part}_lora_layers"] = state
    return states


@torch.inference_mode()
def predicted(model) -> torch.Tensor:
    """The network's output for one text at one step."""
    conditioning = model.encode_texts(["a grey shirt"])
    conditioning |= {"guidance_scale": torch.full((1,), 3.5)} if model.distilled else {}
    latents = torch.randn(
        1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0)
    )
    return model.predict(latents, model.schedule(10, 32, 32).timesteps[3:4], conditioning)


FAMILIES = [
    ("tiny_diffusion", "StableDiffusionPipeline", "unet"),
    ("tiny_xl", "StableDiffusionXLPipeline", "unet"),
    ("tiny_sd3", "StableDiffusion3Pipeline", "transformer"),
    ("tiny_flux", "FluxPipeline", "transformer"),
]


@pytest.mark.parametrize(
    ("family", "kind", "part"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] if each in FAMILIES[1:3] else [])
        for each in FAMILIES
    ],
)
def test_lora_is_added_as_diffusers_adds_it(
    family: str, kind: str, part: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(family)
    file = make_lora(tmp_path, folder, kind, part)
    plain = load_generator(str(folder))
    without = predicted(plain)
    added = load_generator(Address(str(folder), loras=((str(file), 0.7),)))
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="one")
    pipeline.set_adapters(["one"], [0.7])
    setattr(plain, "unet" if part == "unet" else "transformer", getattr(pipeline, part))
    wanted, got = predicted(plain), predicted(added)
    assert (got - without).abs().max() > 1e-3
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() <= 1e-4


@pytest.mark.parametrize(("family", "kind", "part"), [FAMILIES[0], FAMILIES[1], FAMILIES[3]])
@pytest.mark.slow
def test_lora_of_a_text_encoder_beside_one_of_the_network(
    family: str, kind: str, part: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(family)
    files = {
        make_lora(tmp_path / "both", folder, kind, part, "text_encoder"): 0.7,
        make_lora(tmp_path / "one", folder, kind, part): 0.4,
    }
    added = load_generator(
        Address(str(folder), loras=tuple((str(file), scale) for file, scale in files.items()))
    )
    found = find_family(folder)
    pipeline = getattr(diffusers, found.pipeline).from_pretrained(folder)
    for file in files:
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name=file.parent.name
        )
    pipeline.set_adapters([file.parent.name for file in files], list(files.values()))
    wanted, plain = found.build(pipeline), load_generator(str(folder))  # type: ignore[misc]
    wanted.scheduler = plain.scheduler  # type: ignore[attr-defined]
    for got, other in ((predicted(added), predicted(plain)), (words_of(added), words_of(plain))):
        assert (got - other).abs().max() > 1e-3
    for got, right in ((words_of(added), words_of(wanted)), (predicted(added), predicted(wanted))):
        assert ((got - right).abs().max() / right.abs().max()).item() <= 1e-4


@torch.inference_mode()
def words_of(model) -> torch.Tensor:
    """What the first text encoder makes of a text."""
    encoder = (
        model.pipeline.text_encoder
        if hasattr(model, "pipeline")
        else getattr(model, "text_encoders", [(0, None)])[0][1]
    )
    encoder = model.text_encoder if encoder is None else encoder
    return encoder(torch.tensor([[256, 3, 4, 5, 257]]))[0]


def test_lora_enters_the_identity_by_content_and_scale(
    tiny_diffusion: Path, tmp_path: Path
) -> None:
    file = make_lora(tmp_path, tiny_diffusion, "StableDiffusionPipeline", "unet")
    copy = shutil.copy(file, tmp_path / "renamed.safetensors")
    assert describe_loras([]) == ""
    first = describe_loras([(str(file), 0.7)])
    assert first == describe_loras([(str(copy), 0.7)]) != describe_loras([(str(file), 0.5)])


def test_lora_of_another_family_is_told(tiny_xl: Path, tiny_flux: Path, tmp_path: Path) -> None:
    file = make_lora(tmp_path, tiny_flux, "FluxPipeline", "transformer")
    with pytest.raises(CheckpointError, match=r"pytorch_lora_weights"):
        load_generator(Address(str(tiny_xl), loras=((str(file), 1.0),)))


def test_a_lora_with_layers_that_the_network_lacks_is_refused(
    tiny_diffusion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing text encoders are reported: a checkpoint may have fewer than the trained one."""
    file = make_lora(tmp_path, tiny_diffusion, "StableDiffusionPipeline", "unet", "text_encoder")
    load_generator(Address(str(tiny_diffusion), loras=((str(file), 1.0),)))
    told = capsys.readouterr()
    assert "no effect" not in told.out + told.err
    whole = load_file(file)
    for part, layer, other in (("unet", "to_q", "to_z"), ("text_encoder", "q_proj", "z_proj")):
        name = next(key for key in whole if key.startswith(part) and f"{layer}.lora_A" in key)
        extra = {
            key.replace(layer, other): whole[key].clone()
            for key in (name, name.replace("lora_A", "lora_B"))
        }
        save_file(whole | extra, file)
        layers = sum(key.startswith(part) and "lora_A" in key for key in whole) + 1
        words = f"weights for {layers} layers, {layers - 1} of which"
        if part == "unet":
            with pytest.raises(CheckpointError, match=words):
                load_generator(Address(str(tiny_diffusion), loras=((str(file), 1.0),)))
        else:
            load_generator(Address(str(tiny_diffusion), loras=((str(file), 1.0),)))
            told = capsys.readouterr()
            assert words in " ".join((told.out + told.err).split())


def as_peft(file: Path, folder: Path, part: str, **settings: Any) -> Path:
    """A LoRA of one part in peft's own layout."""
    folder.mkdir()
    tensors = {
        name.replace(f"{part}.", "base_model.model.", 1): tensor
        for name, tensor in load_file(file).items()
        if name.startswith(f"{part}.")
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_lora_in_the_layout_of_peft_is_added_with_its_alpha(
    tiny_diffusion: Path, tmp_path: Path, part: str
) -> None:
    """α = 6 at rank 2 is three times diffusers' scale, and rsLoRA's is α / √r."""
    file = make_lora(tmp_path / "plain", tiny_diffusion, "StableDiffusionPipeline", part)
    one = as_peft(file, tmp_path / "one", part)
    root = as_peft(file, tmp_path / "root", part, use_rslora=True)
    plain = predicted(load_generator(str(tiny_diffusion)))
    for other, scale in ((one, 3.0), (root, 6 / 2**0.5)):
        got, wanted = (
            predicted(load_generator(Address(str(tiny_diffusion), loras=((str(path), factor),))))
            for path, factor in ((other, 0.5), (file, 0.5 * scale))
        )
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, plain, atol=1e-3)
    assert describe_loras([(str(one), 1.0)]) != describe_loras([(str(root), 1.0)])


def test_a_lora_of_peft_that_cannot_be_read_is_told(
    tiny_diffusion: Path, tiny_xl: Path, tmp_path: Path
) -> None:
    file = make_lora(tmp_path / "plain", tiny_diffusion, "StableDiffusionPipeline", "unet")
    for number, (settings, words) in enumerate(
        [
            ({"use_dora": True}, "use_dora"),
            ({"peft_type": "LOHA"}, "'LOHA'"),
            ({"lora_alpha": "x"}, "lora_alpha 'x'"),
            ({"bias": "all"}, "'all'"),
            ({"alpha_pattern": {"a": 1}}, "alpha_pattern"),
        ]
    ):
        other = as_peft(file, tmp_path / str(number), "unet", **settings)
        with pytest.raises(CheckpointError, match=words):
            check_generator(Address(str(tiny_diffusion), loras=((str(other), 1.0),)), 10)
    (other.parent / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs the adapter_config\.json"):
        check_generator(Address(str(tiny_diffusion), loras=((str(other), 1.0),)), 10)
    whole = as_peft(
        make_lora(tmp_path / "xl", tiny_xl, "StableDiffusionXLPipeline", "unet"),
        tmp_path / "p",
        "unet",
    )
    with pytest.raises(CheckpointError, match="another family or version"):
        load_generator(Address(str(tiny_diffusion), loras=((str(whole), 1.0),)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lycoris_x.lokr_w1", "LoKr"),
        ("x.oft_blocks", "OFT"),
        ("unet.conv_in.weight", "no LoRA"),
    ],
)
def test_other_kinds_of_adapters_are_told_before_anything_is_loaded(
    name: str, kind: str, tiny_diffusion: Path, tmp_path: Path
) -> None:
    file = tmp_path / "style.safetensors"
    save_file({name: torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=kind):
        check_generator(Address(str(tiny_diffusion), loras=((str(file), 1.0),)), 10)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.safetensors", "there is no file"),
        ("one.ckpt", "pickled weights, which are refused"),
    ],
)
def test_missing_or_pickled_lora_is_told_before_anything_is_loaded(
    tiny_diffusion: Path, tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        check_generator(Address(str(tiny_diffusion), loras=((str(tmp_path / name), 1.0),)), 10)


# ---------------------------------------------------------------- a single file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_unet(state: dict[str, torch.Tensor], layers: int = 1) -> dict[str, torch.Tensor]:
    """Names in published Stable Diffusion files for those of diffusers' UNet.

    Down: plain, attention; up: attention, plain.
    """
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }

    def renamed(name: str) -> str:
        part = name.split(".")
        if part[0] not in {"down_blocks", "up_blocks", "mid_block"}:
            start = next(each for each in fixed if name.startswith(each))
            return fixed[start] + name.removeprefix(start)
        if part[0] == "mid_block":
            place = f"middle_block.{1 if part[1] == 'attentions' else 2 * int(part[2])}"
            kind, rest = part[1], part[3:]
        else:
            block, kind, number, rest = int(part[1]), part[2], int(part[3]), part[4:]
            if kind == "downsamplers":
                return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest[-1]}"
            if kind == "upsamplers":
                # after a block with attention
                return f"output_blocks.{(layers + 1) * block + layers}.2.conv.{rest[-1]}"
            index = (layers + 1) * block + number
            place = (
                f"input_blocks.{index + 1}"
                if part[0] == "down_blocks"
                else f"output_blocks.{index}"
            )
            place += ".1" if kind == "attentions" else ".0"
        return ".".join([place, *([RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest)])

    return {f"model.diffusion_model.{renamed(name)}": tensor for name, tensor in state.items()}


def original_vae(state: dict[str, torch.Tensor], blocks: int = 3) -> dict[str, torch.Tensor]:
    """Names of the published files for those of diffusers' AutoencoderKL."""
    attention = {
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "group_norm": "norm",
    }
    result = {}
    for name, tensor in state.items():
        new = (
            name.replace("conv_shortcut", "nin_shortcut")
            .replace("conv_norm_out", "norm_out")
            .replace(".resnets.", ".block.")
        )
        if "mid_block" in new:
            for number in (0, 1):
                new = new.replace(f"mid_block.block.{number}.", f"mid.block_{number + 1}.")
            new = new.replace("mid_block.attentions.0.", "mid.attn_1.")
            for ours, theirs in attention.items():
                new = new.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            if "attn_1" in new and new.endswith("weight") and "norm" not in new:
                tensor = tensor[:, :, None, None]
        for block in range(blocks):
            new = new.replace(f"encoder.down_blocks.{block}.", f"encoder.down.{block}.")
            new = new.replace(f"decoder.up_blocks.{block}.", f"decoder.up.{blocks - 1 - block}.")
        new = new.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        result[f"first_stage_model.{new}"] = tensor
    return result


def original_clip(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Names in published files for those of transformers' CLIP text encoder, which they keep."""
    state = load_file(folder / "model.safetensors")
    return {
        f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in state.items()
    }


def original_open_clip(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Names of OpenCLIP, with the three projections of attention in one, for transformers'."""
    names = {
        "text_model.": "",
        "encoder.layers": "transformer.resblocks",
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    result: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name == "text_projection.weight":
            result["text_projection"] = tensor.T
        else:
            result[name] = tensor
    for name in [name for name in result if ".attn.q_proj." in name]:
        parts = [result.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        result[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return {f"{prefix}.model.{name}": tensor for name, tensor in result.items()}


def write_single(folder: Path, file: Path) -> Path:
    """A folder's weights in one file of the original layout, its configurations beside it."""
    state = original_unet(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    state |= original_vae(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    first, second = (folder / name for name in ("text_encoder", "text_encoder_2"))
    if not second.is_dir():
        state |= original_clip(first, "cond_stage_model")
    elif first.is_dir():
        state |= original_clip(first, "conditioner.embedders.0") | original_open_clip(
            second, "conditioner.embedders.1"
        )
    else:
        state |= original_open_clip(second, "conditioner.embedders.0")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    shutil.copytree(folder, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return file


@pytest.fixture
def single(tiny_diffusion: Path, tmp_path: Path) -> Path:
    return write_single(tiny_diffusion, tmp_path / "tiny.safetensors")


def test_single_file_gives_the_same_model_as_its_folder(single: Path, tiny_diffusion: Path) -> None:
    from_file, from_folder = load_generator(str(single)), load_generator(str(tiny_diffusion))
    torch.testing.assert_close(predicted(from_file), predicted(from_folder), rtol=1e-5, atol=1e-5)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(
            from_file.encode_images(pixels), from_folder.encode_images(pixels), rtol=1e-5, atol=1e-5
        )
        latents = torch.randn(1, 4, 8, 8)
        assert (
            from_file.decode(latents).int() - from_folder.decode(latents).int()
        ).abs().max() <= 1


@pytest.mark.parametrize("refiner", [False, True])
def test_single_file_of_sdxl_gives_the_same_model_as_its_folder(
    refiner: bool, tmp_path: Path
) -> None:
    """diffusers tells the text encoders of such a file apart by their widths."""
    folder = make_xl(tmp_path / "xl", refiner, width=48)
    file = write_single(folder, tmp_path / "single.safetensors")
    from_file, from_folder = load_generator(str(file)), load_generator(str(folder))
    latents, step = torch.randn(1, 4, 8, 8), torch.tensor([501])
    with torch.inference_mode():
        got, wanted = (
            from_file.encode_texts(["a grey shirt"]),
            from_folder.encode_texts(["a grey shirt"]),
        )
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            from_file.predict(latents, step, got),
            from_folder.predict(latents, step, wanted),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("sign", ["middle_block", "cond_stage_model", "decoder.conv_out"])
def test_single_file_that_lacks_weights_is_told(sign: str, single: Path) -> None:
    save_file(
        {name: tensor for name, tensor in load_file(single).items() if sign not in name}, single
    )
    with pytest.raises(
        CheckpointError,
        match=r"tiny\.safetensors' (has no .* missing|cannot be loaded)",
    ):
        load_generator(str(single))


def test_single_file_with_its_configuration_elsewhere(single: Path, tmp_path: Path) -> None:
    settings = single.with_suffix("").rename(tmp_path / "settings")
    with pytest.raises(CheckpointError, match=r"single file .* beside it as tiny/") as raised:
        describe_generator(str(single))
    assert raised.value.argument == "config"
    found = describe_generator(Address(str(single), config=str(settings)))
    assert (found.family, found.size, found.multiple) == ("Stable Diffusion 1.x/2.x", 32, 4)
    model = load_generator(Address(str(single), config=str(settings)), "float16")
    assert (model.dtype, model.vae.dtype) == (torch.float16, torch.float32)  # type: ignore[attr-defined]


def test_single_file_is_identified_by_its_content(single: Path, tmp_path: Path) -> None:
    other = shutil.copy(single, tmp_path / "other.safetensors")
    shutil.copytree(single.with_suffix(""), tmp_path / "other")
    assert describe_generator(str(other)) == describe_generator(str(single))
    state = load_file(single)
    name = next(iter(state))
    save_file(state | {name: state[name] + 1}, tmp_path / "third.safetensors")
    shutil.copytree(single.with_suffix(""), tmp_path / "third")
    assert (
        describe_generator(str(tmp_path / "third.safetensors")).model
        != describe_generator(str(single)).model
    )


def test_half_a_single_file_and_a_pickled_one_are_told(single: Path) -> None:
    data = single.read_bytes()
    single.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors' cannot be loaded"):
        load_generator(str(single))
    with pytest.raises(CheckpointError, match="pickled weights, which are refused"):
        load_generator(str(single.rename(single.with_suffix(".ckpt"))))


def test_a_tokenizer_may_share_a_folder_with_the_text_encoder(
    tiny_diffusion: Path, tmp_path: Path
) -> None:
    """Weights beside a tokenizer are not its own; as in benchmarks/checkpoints/cifar."""
    folder = shutil.copytree(tiny_diffusion, tmp_path / "shared")
    shutil.copytree(folder / "text_encoder", folder / "tokenizer", dirs_exist_ok=True)
    assert torch.equal(
        predicted(load_generator(str(folder))), predicted(load_generator(str(tiny_diffusion)))
    )
