"""Class tokens: a step is that of textual inversion, nothing else changes, and diffusers reads the
file."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from discl.errors import CheckpointError, DataError
from discl.spectrum import adaptation
from discl.spectrum.adaptation import AdapterImages, train_adapter
from discl.spectrum.adaptation_memory import estimate_memory
from discl.spectrum.engine import Engine
from discl.spectrum.low_rank import AdapterSettings, record_of, tokens_of
from discl.spectrum.models import Address, load_generator
from discl.spectrum.models.class_tokens import ClassTokens, load_class_tokens, trained_tokens
from discl.spectrum.plan import Request
from helpers.adapting import CLASSES, bytes_kept, make_images

NAMES = list(CLASSES)
ALONE = AdapterSettings(rank=0, steps=3, batch_size=4, class_tokens=2, token_learning_rate=1e-2)


@pytest.fixture(scope="module")
def tiny_model(tiny_diffusion):
    """Shared by the tests: a training leaves it as it was."""
    return load_generator(str(tiny_diffusion))


def state_of(model) -> dict[str, torch.Tensor]:
    parts = {"network": model.network} | {each.part: each.network for each in model.text_encoders}
    return {
        f"{part}.{name}": value.clone()
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }


def train(model, target: Path, settings: AdapterSettings = ALONE, **others) -> Path:
    images = others.pop("images", None) or make_images(size=model.size)
    return train_adapter(model, images, settings, target, names=NAMES, **others)


def add_tokens(pipeline, file):
    for name, rows in load_file(file).items():
        part, token = name.split(".", 1)
        tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
        encoder = getattr(pipeline, part)
        pipeline.load_textual_inversion({token: rows}, text_encoder=encoder, tokenizer=tokenizer)


def test_the_function_of_these_tests_is_that_of_the_docs() -> None:
    page = Path(__file__).parents[2] / "docs/worth.md"
    assert inspect.getsource(add_tokens) in page.read_text()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a photo of a bag", "a photo of a <class-0> <class-0>_1"),
        ("Bag: one Bag, handbags", "<class-0> <class-0>_1: one <class-0> <class-0>_1, handbags"),
        ("Bag: a bag", "Bag: a <class-0> <class-0>_1"),
        ("a purse", "<class-0> <class-0>_1, a purse"),
        ("a coat", "<class-0> <class-0>_1, a coat"),
        ("", ""),
    ],
)
def test_tokens_are_written_for_the_name_or_else_before_the_text(text: str, written: str) -> None:
    assert ClassTokens(("bag", "coat"), 2).write(text, 0) == written


def test_a_name_is_a_text_and_no_pattern() -> None:
    tokens = ClassTokens(("t-shirt/top (.*)",), 1)
    assert tokens.write("a T-shirt/top (.*) \\1", 0) == "a <class-0> \\1"
    with pytest.raises(DataError) as caught:
        tokens.write("a photo", 1)
    assert caught.value.argument == "label"


def test_a_step_is_that_of_textual_inversion(tiny_model, tiny_diffusion, tmp_path, monkeypatch):
    """Loss and gradient of the new rows as diffusers' parts give them, worked out here (1e-5)."""
    from diffusers import StableDiffusionPipeline

    drawn, found = [], {}
    draw, step = adaptation._draw, adaptation._take_step

    def record(optimizer, loss, *args):
        (rows,) = optimizer.param_groups[0]["params"]
        found.update(loss=loss.item(), rows=rows.detach().clone(), gradient=rows.grad.clone())
        step(optimizer, loss, *args)

    monkeypatch.setattr(
        adaptation, "_draw", lambda *args, **more: drawn.append(draw(*args, **more)) or drawn[-1]
    )
    monkeypatch.setattr(adaptation, "_take_step", record)
    settings = AdapterSettings(rank=0, steps=1, class_tokens=2)
    train(tiny_model, tmp_path / "a.safetensors", settings)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion, safety_checker=None)
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    table = encoder.get_input_embeddings().weight.detach()
    ids = [tokenizer(name, add_special_tokens=False).input_ids for name in NAMES]
    starts = torch.stack([table[each].mean(0) for each in ids]).repeat_interleave(2, 0)
    assert torch.allclose(found["rows"], starts, atol=1e-7)
    first = len(tokenizer)
    tokenizer.add_tokens(["<class-0>", "<class-0>_1", "<class-1>", "<class-1>_1"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = encoder.get_input_embeddings().weight
    weight.data[first:] = starts
    (batch,) = drawn
    assert all("<class-" in text for text in batch["texts"])
    tokens = tokenizer(
        batch["texts"], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    noisy = pipeline.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    states = encoder(tokens.input_ids)[0]
    loss = F.mse_loss(pipeline.unet(noisy, batch["timesteps"], states).sample, batch["noise"])
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = weight.grad[first:]
    assert expected.abs().max() > 0
    assert (found["gradient"] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_only_the_new_rows_learn_and_diffusers_reads_them(
    tiny_model, tiny_diffusion, tmp_path, rank
):
    from diffusers import StableDiffusionPipeline

    model = tiny_model
    before, vocabulary = state_of(model), len(model.tokenizer)
    settings = AdapterSettings(**vars(ALONE) | {"rank": rank})
    target = train(model, tmp_path / "a.safetensors", settings)
    after = state_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.class_tokens is None and len(model.tokenizer) == vocabulary
    assert all(parameter.requires_grad for parameter in model.text_encoder.parameters())
    assert target.exists() == bool(rank)
    record = json.loads(record_of(tokens_of(target)).read_text())
    assert record["class_tokens"] == 2 and record["values"] >= 4 * 32

    loras = ((str(target), 1.0),) if rank else ()
    adapted = load_generator(Address(str(tiny_diffusion), None, loras, str(tokens_of(target))))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion, safety_checker=None)
    add_tokens(pipeline, tokens_of(target))
    prompt = adapted.class_tokens.write("a photo of a coat", 1)
    expected, empty = pipeline.encode_prompt("a photo of a <class-1>", "cpu", 1, True)
    with torch.no_grad():
        found = adapted.encode_texts([prompt, ""])["encoder_hidden_states"]
        plain = model.encode_texts(["a photo of a coat", ""])["encoder_hidden_states"]
    assert torch.allclose(found[:1], expected, atol=1e-6)
    assert torch.allclose(found[1:], empty, atol=1e-6) and torch.equal(found[1], plain[1])
    assert not torch.allclose(found[0], plain[0], atol=1e-3)


@pytest.mark.slow
def test_sdxl_learns_rows_of_both_text_encoders(tiny_xl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    model = load_generator(str(tiny_xl))
    before = state_of(model)
    settings = AdapterSettings(**vars(ALONE) | {"gradient_checkpointing": True})
    target = train(model, tmp_path / "a.safetensors", settings)
    assert all(torch.equal(before[name], value) for name, value in state_of(model).items())
    adapted = load_generator(Address(str(tiny_xl), class_tokens=str(tokens_of(target))))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_xl)
    add_tokens(pipeline, tokens_of(target))
    states, _, pooled, _ = pipeline.encode_prompt(
        "a photo of a <class-0>", device="cpu", do_classifier_free_guidance=False
    )
    with torch.no_grad():
        found = adapted.encode_texts([adapted.class_tokens.write("a photo of a bag", 0)])
    assert torch.allclose(found["encoder_hidden_states"], states, atol=1e-6)
    assert torch.allclose(found["text_embeds"], pooled, atol=1e-6)
    with torch.no_grad(), trained_tokens(model, NAMES, 2) as starts:
        values = {part: rows.clone() for part, rows in starts.items()}
    stored = load_file(tokens_of(target))
    assert values.keys() == {"text_encoder", "text_encoder_2"}
    for part, rows in values.items():
        assert not torch.allclose(stored[f"{part}.<class-0>"], rows[:2], atol=1e-3)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_training_continues_to_the_same_tokens(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "SAVE_EVERY", 2)
    settings = AdapterSettings(**vars(ALONE) | {"rank": 2, "steps": 5})
    model, done = tiny_model, []

    def kill(steps: int) -> None:
        done.append(steps)
        if len(done) == 3:
            raise Killed

    whole = train(model, tmp_path / "whole.safetensors", settings)
    target = tmp_path / "killed.safetensors"
    with pytest.raises(Killed):
        train(model, target, settings, progress=kill)
    train(model, target, settings, progress=done.append)
    assert len(done) == 3 + 3, "it continues after the second step"
    assert tokens_of(whole).read_bytes() == tokens_of(target).read_bytes()
    assert whole.read_bytes() == target.read_bytes()


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_computed_in_parts(tiny_model, tmp_path, monkeypatch):
    whole, calls = train(tiny_model, tmp_path / "whole.safetensors"), []
    known = tiny_model.predict

    def predict(latents, timesteps, conditioning):
        calls.append(len(latents))
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return known(latents, timesteps, conditioning)

    monkeypatch.setattr(tiny_model, "predict", predict)
    parts = train(tiny_model, tmp_path / "parts.safetensors")
    assert calls == [4, 2] + [1] * 12
    first, second = load_file(tokens_of(whole)), load_file(tokens_of(parts))
    assert all(torch.allclose(first[name], second[name], rtol=1e-3) for name in first)


def test_a_class_without_images_keeps_the_embedding_of_its_name(tiny_model, tmp_path):
    model, images = tiny_model, make_images()
    only = AdapterImages(images.load, np.zeros(2, int), [["a bag"]] * 2)
    with trained_tokens(model, NAMES, 2) as starts:
        expected = starts["text_encoder"].detach().clone()
    target = train(model, tmp_path / "a.safetensors", images=only)
    found = load_file(tokens_of(target))
    assert torch.equal(found["text_encoder.<class-1>"], expected[2:])
    assert not torch.equal(found["text_encoder.<class-0>"], expected[:2])


def test_the_engine_alone_sees_tokens(tiny_model, tiny_diffusion, tmp_path):
    target = train(tiny_model, tmp_path / "a.safetensors")
    model = load_generator(Address(str(tiny_diffusion), class_tokens=str(tokens_of(target))))
    seen, known = [], model.encode_texts
    model.encode_texts = lambda texts, negative=False: seen.extend(texts) or known(texts, negative)
    request = Request.of("a coat", 50, "0", 32, label=1, negative_prompt="a blurred coat")
    engine = Engine(model, num_inference_steps=2, guidance_scale=3.0, slots=1)
    ((made, _),) = engine.generate([request], lambda source: np.zeros((32, 32, 3), np.uint8))
    assert made.prompt == "a coat"
    assert {text for text in seen if text} == {"a <class-1> <class-1>_1", "a blurred coat"}


def test_prompts_of_the_prior_are_plain(tiny_model, tmp_path, monkeypatch):
    drawn, draw = [], adaptation._draw
    monkeypatch.setattr(
        adaptation, "_draw", lambda *args, **more: drawn.append(draw(*args, **more)) or drawn[-1]
    )
    settings = AdapterSettings(rank=0, steps=1, class_tokens=1, prior_weight=1.0)
    train(tiny_model, tmp_path / "a.safetensors", settings, prior=make_images(4))
    real, prior = (set(each["texts"]) for each in drawn)
    assert all("<class-" in text for text in real)
    assert prior <= {"a photo of a bag", "a photo of a coat"}


def test_tokens_alone_need_no_peft_and_tell_a_bad_rate(tiny_model, tmp_path, monkeypatch):
    from discl.errors import TrainingError
    from discl.spectrum.models import loras

    monkeypatch.setattr(loras.importlib.util, "find_spec", lambda name: None)
    model, wild = tiny_model, {"token_learning_rate": 1e30, "steps": 9}
    target = train(model, tmp_path / "a.safetensors")
    assert tokens_of(target).exists()
    with pytest.raises(TrainingError) as caught:
        train(model, tmp_path / "b.safetensors", AdapterSettings(**vars(ALONE) | wild))
    assert caught.value.argument == "token_learning_rate"
    assert not list(tmp_path.glob("b*")) and model.class_tokens is None


def test_what_has_no_room_for_tokens_is_refused(tiny_model, tmp_path, caplog):
    model, target = tiny_model, tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="16") as long:
        train(model, target, images=make_images(text="a rather long text {}"))
    assert long.value.argument == "class_tokens"
    with pytest.raises(DataError, match="no tokens") as empty:
        train_adapter(model, make_images(), ALONE, target, names=["bag", " "])
    assert empty.value.argument == "names"
    train(model, target, images=make_images(text="a {} on a long table"))
    assert "longer than the generator reads" in caplog.text
    train(model, tmp_path / "b.safetensors", images=make_images(text="a hat"))
    assert "do not hold the name" in caplog.text


def rows(width: int = 32, count: int = 2) -> torch.Tensor:
    return torch.zeros(count, width)


GOOD = {"text_encoder.<class-0>": rows(), "text_encoder.<class-1>": rows()}


@pytest.mark.parametrize(
    ("tensors", "names", "words"),
    [
        (GOOD | {"text_encoder.<class-1>": rows() / 0}, NAMES, "no finite numbers"),
        (GOOD | {"text_encoder.<class-1>": rows().int()}, NAMES, "no finite numbers"),
        (GOOD | {"text_encoder.<class-2>": rows()}, NAMES, "also holds"),
        (GOOD | {"text_encoder_2.<class-0>": rows()}, NAMES, "text_encoder_2"),
        (GOOD, [*NAMES, "hat"], "lacks"),
        (GOOD | {"text_encoder.<class-1>": rows(31)}, NAMES, "shape"),
        (GOOD | {"text_encoder.<class-1>": rows(count=1)}, NAMES, "shape"),
        ({name: rows(count=17) for name in GOOD}, NAMES, "1 to 16"),
        (GOOD, ["bag", ""], "class names"),
        (GOOD, None, "class names"),
        ({"unet.conv.lora_A.weight": rows()}, None, "class names"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tiny_model, tmp_path, tensors, names, words):
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, None if names is None else {"names": json.dumps(names)})
    with pytest.raises(CheckpointError, match=words):
        load_class_tokens(tiny_model, str(file))
    assert tiny_model.class_tokens is None


def test_a_file_that_is_no_safetensors_or_absent_is_refused(tiny_model, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x02}q\x00.")
    for name in ("a.safetensors", "absent.safetensors"):
        with pytest.raises(CheckpointError, match=name):
            load_class_tokens(tiny_model, str(tmp_path / name))


def test_a_flow_takes_no_tokens(tiny_flux, tmp_path):
    with pytest.raises(CheckpointError, match="SDXL") as loaded:
        load_generator(Address(str(tiny_flux), class_tokens=str(tmp_path / "a.safetensors")))
    with pytest.raises(CheckpointError, match="SDXL") as trained:
        train(load_generator(str(tiny_flux)), tmp_path / "c.safetensors")
    assert loaded.value.argument == trained.value.argument == "class_tokens"


def test_the_memory_told_beforehand_counts_tokens_and_text_encoders(tiny_diffusion):
    model = load_generator(str(tiny_diffusion))  # its own, because it is frozen
    found = estimate_memory(str(tiny_diffusion), "float32", ALONE, 16, 2)
    assert found.values == 4 * 32 and found.state == 16 * 4 * 32
    model.network.requires_grad_(False)

    def step() -> None:
        texts = model.encode_texts(["a <class-0>"])
        model.predict(torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.int64), texts)

    with trained_tokens(model, NAMES, 2):
        real = bytes_kept([model.unet, model.text_encoder], step)
    assert found.activations == pytest.approx(real, rel=0.15)
