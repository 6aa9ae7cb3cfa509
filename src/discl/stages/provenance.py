"""Describes how the images are made, for the report and for the card of an export."""

from __future__ import annotations

from ..checkpoints import public_name
from ..levels import format_level
from ..recipe import Filter, Hard, Prompts, Recipe, Spectrum
from ..spectrum.models import Generator
from ..spectrum.models.stable_diffusion import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE


def describe_making(recipe: Recipe, generator: Generator, size: int) -> dict[str, str]:
    """`{what: in words}`, from the hard images to the filter; `size` is in pixels a side.

    Folders of this machine are left out of names, and so is what the recipe does not ask for.
    """
    asked = recipe.spectrum
    return {
        "hard images": _hard(recipe.hard),
        "generator": f"{public_name(asked.checkpoint)} (digest {generator.model}), {generator.family}",
        "levels λ": ", ".join(map(format_level, sorted(asked.levels))),
        "seeds": _seeds(asked),
        "sampler": f"{generator.sampler}; {_steps(asked)}",
        "guidance scale": _guidance(asked, generator),
        "pixels": _pixels(asked, size),
        "precision and encoding": f"{asked.dtype}, {asked.encoding}",
        "prompts": _prompts(recipe.prompts),
        **_options(recipe, generator),
        "filter": _filter(recipe.filter),
    }


def _hard(rule: Hard) -> str:
    but = f"; never those of {', '.join(rule.exclude)}" if rule.exclude else ""
    if rule.rule == "tail":
        return f"all images of classes with fewer than {rule.fewer_than} training images{but}"
    return (
        f"images whose true class gets a probability below {rule.below:g} by classifiers that did "
        f"not see them ({rule.folds} folds){but}"
    )


def _seeds(asked: Spectrum) -> str:
    tries = (
        f", each drawn up to {asked.tries} times until the filter keeps one"
        if asked.tries > 1
        else ""
    )
    return f"{asked.seeds} per hard image and level{tries}"


def _steps(asked: Spectrum) -> str:
    steps = asked.num_inference_steps
    if asked.steps == "fixed":
        return f"{steps} inference steps at every level, finer ones over the last (1 − λ) of the noise schedule"
    return f"{steps} inference steps, of which a level λ takes the last ⌊(1 − λ) · {steps}⌋"


def _guidance(asked: Spectrum, generator: Generator) -> str:
    scale = f"{asked.guidance_scale:g} (as diffusers counts it)"
    if generator.distilled:
        return f"{scale}, told to the network, whose guidance is distilled"
    return scale if _is_guided(asked, generator) else "1, no guidance"


def _is_guided(asked: Spectrum, generator: Generator) -> bool:
    return asked.guidance_scale != 1 and not generator.distilled


def _pixels(asked: Spectrum, size: int) -> str:
    if asked.resize == "square":
        return f"{size} × {size}, sources cut to their centre squares"
    return f"about {size} × {size} at the source's own aspect, to 4 : 1"


def _prompts(asked: Prompts) -> str:
    if asked.endpoint is not None:
        return f"descriptions of each class by {public_name(asked.endpoint.model)}, perhaps edited; one drawn per source and seed"
    if asked.phrases is not None:
        return f"phrase list {public_name(asked.phrases)}; one drawn per source and seed"
    texts = "; ".join(f"“{template}”" for template in asked.templates)
    if asked.settings is not None:
        return f"{texts}, settings by {public_name(asked.settings.endpoint.model)}, perhaps edited; one drawn per source and seed"
    return (
        texts
        if asked.captions is None
        else f"{texts}, captions by {public_name(asked.captions.checkpoint)}"
    )


def _options(recipe: Recipe, generator: Generator) -> dict[str, str]:
    """Lines of what only some runs ask for."""
    asked, facts = recipe.spectrum, {}
    if recipe.prompts.negative:
        unused = (
            ""
            if _is_guided(asked, generator)
            else "; without effect, for there is no guidance that leads away from it"
        )
        facts["negative prompt"] = f"“{recipe.prompts.negative}”{unused}"
    if recipe.prompts.prefix:
        facts["before each prompt"] = f"“{recipe.prompts.prefix}”"
    if recipe.prompts.names:
        facts["names in prompts"] = (
            f"other than in this data set for {len(recipe.prompts.names)} of the classes"
        )
    if asked.guidance_interval != (0.0, 1.0):
        low, high = asked.guidance_interval
        facts["guidance interval"] = (
            f"guided only at noise shares in ({low:g}, {high:g}], 1 being pure noise"
        )
    if generator.aesthetic:
        facts["aesthetic score"] = (
            f"{AESTHETIC_SCORE:g}, and {NEGATIVE_AESTHETIC_SCORE:g} for what guidance leads away from"
        )
    if asked.loras:
        facts["LoRA"] = ", ".join(
            f"{public_name(lora.path)} × {lora.scale:g}" for lora in asked.loras
        )
    if asked.adapt is not None:
        facts["adapted"] = (
            f"low-rank weights of rank {asked.adapt.rank}, {asked.adapt.steps} steps on the real "
            "training images"
        )
    return facts


def _filter(asked: Filter) -> str:
    clip = public_name(asked.checkpoint)
    if asked.rule == "alia":
        return (
            f"ALIA's two (arXiv 2305.16289): images that {clip} finds nearer to a text that fits any "
            f"picture than to “{asked.positive or asked.template}”, and images that a classifier of the "
            "real ones finds too easy or mislabelled, are dropped"
        )
    threshold = f"{asked.threshold:g}".replace("-", "−")
    return f"clip_similarity ≥ {threshold} with “{asked.template}”, by {clip}"
