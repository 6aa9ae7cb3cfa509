"""Describes how the images are made, for the report and for the card of an export."""

from __future__ import annotations

from ..checkpoints import public_name
from ..levels import format_level
from ..recipe import Filter, Hard, Prompts, Recipe, Spectrum
from ..recipe.filter import BAND
from ..spectrum.models import Generator
from ..spectrum.models.stable_diffusion import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE
from ..utils.counts import count_of, list_some
from ..utils.plugins import read_piece


def describe_making(recipe: Recipe, generator: Generator, size: int) -> dict[str, str]:
    """`{title: text}`, from the hard images to the filter.

    - `size`: pixels a side.

    Names hold no folders of this machine. Options that the recipe does not use are left out.
    """
    config = recipe.spectrum
    return {
        "hard images": _hard(recipe.hard),
        "generator": f"{public_name(config.checkpoint)} (digest {generator.model}), "
        f"{generator.family}",
        "levels λ": ", ".join(map(format_level, sorted(config.levels))),
        "seeds": _seeds(config),
        "sampler": f"{_sampler(config, generator)}; {_steps(config)}",
        "guidance scale": _guidance(config, generator),
        "pixels": _pixels(config, size),
        "precision and encoding": f"{config.dtype}, {config.encoding}",
        "prompts": _prompts(recipe.prompts),
        **_options(recipe, generator),
        "filter": _filter(recipe.filter),
    }


def _hard(rule: Hard) -> str:
    but = f"; never of the classes {', '.join(rule.exclude)}" if rule.exclude else ""
    if rule.rule == "tail":
        return f"all images of classes with fewer than {rule.fewer_than} training images{but}"
    return (
        f"images with a true-class probability below {rule.below:g} by classifiers that did not "
        f"train on them ({rule.folds} folds){but}"
    )


def _seeds(config: Spectrum) -> str:
    if config.wanted is not None:
        most = config.wanted * config.tries
        return (
            f"as many per hard image and level as the filter needs to keep {config.wanted}, {most} "
            f"at most{_budget(config)}"
        )
    tries = (
        f", each with up to {config.tries} tries until the filter keeps one"
        if config.tries > 1
        else ""
    )
    return f"{config.seeds} per hard image and level{tries}{_budget(config)}"


def _budget(config: Spectrum) -> str:
    """The budget, empty without one."""
    if config.budget is None:
        return ""
    units = {"unet_rows": "UNet rows", "images": "images", "hours": "hours"}
    stated = ", ".join(
        f"{value:,} {units[name]}" for name, value in config.budget if value is not None
    )
    return f"; a budget of {stated} for all"


def _sampler(config: Spectrum, generator: Generator) -> str:
    name = generator.sampler if config.sampler == "ddim" else config.sampler
    spacing = config.timestep_spacing
    return name if spacing is None else f"{name} with {spacing} timesteps"


def _steps(config: Spectrum) -> str:
    steps = config.num_inference_steps
    if config.steps == "fixed":
        return (
            f"{steps} inference steps at every level, spread over the last (1 − λ) of the noise "
            "schedule"
        )
    return f"{steps} inference steps; level λ takes the last ⌊(1 − λ) · {steps}⌋ of them"


def _guidance(config: Spectrum, generator: Generator) -> str:
    scale = f"{config.guidance_scale:g} (as diffusers counts it)"
    if generator.distilled:
        return f"{scale}, an input of the network, which is guidance-distilled"
    return scale if _is_guided(config, generator) else "1, no guidance"


def _is_guided(config: Spectrum, generator: Generator) -> bool:
    return config.guidance_scale != 1 and not generator.distilled


def _pixels(config: Spectrum, size: int) -> str:
    if config.resize == "square":
        return f"{size} × {size}; sources are cropped to their centre squares"
    return f"about {size} × {size} at the aspect of the source, at most 4 : 1"


def _prompts(config: Prompts) -> str:
    if config.endpoint is not None:
        return (
            f"descriptions of each class by {public_name(config.endpoint.model)}, perhaps edited; "
            "one per source and seed"
        )
    if config.phrases is not None:
        return f"phrase list {public_name(config.phrases)}; one per source and seed"
    texts = "; ".join(f"“{template}”" for template in config.templates)
    if config.settings is not None:
        return (
            f"{texts}, settings by {public_name(config.settings.endpoint.model)}, perhaps edited; "
            "one per source and seed"
        )
    return (
        texts
        if config.captions is None
        else f"{texts}, captions by {public_name(config.captions.checkpoint)}"
    )


def _options(recipe: Recipe, generator: Generator) -> dict[str, str]:
    """Lines of options that only some runs use."""
    config, facts = recipe.spectrum, {}
    if recipe.loop is not None and recipe.loop.rounds > 1:
        facts["rounds"] = (
            f"{recipe.loop.rounds}, each asking for the next seeds by the policy "
            f"{read_piece('policy', recipe.loop.policy)[0]}"
        )
    if recipe.prompts.negative:
        unused = "" if _is_guided(config, generator) else "; no effect without guidance"
        facts["negative prompt"] = f"“{recipe.prompts.negative}”{unused}"
    if recipe.prompts.prefix:
        facts["before each prompt"] = f"“{recipe.prompts.prefix}”"
    if recipe.prompts.names:
        facts["names in prompts"] = (
            f"differ from this data set for {len(recipe.prompts.names)} of the classes"
        )
    if config.guidance_interval != (0.0, 1.0):
        low, high = config.guidance_interval
        facts["guidance interval"] = (
            f"guided only at noise fractions in ({low:g}, {high:g}], where 1 is pure noise"
        )
    if config.early_rejection is not None:
        looks = " and ".join(f"{fraction:.0%}" for fraction in config.early_rejection.at)
        facts["early rejection"] = (
            f"images are looked at after {looks} of their steps; at most "
            f"{config.early_rejection.loss:.1%} of those that the filter would keep are lost"
        )
    if generator.aesthetic:
        facts["aesthetic score"] = (
            f"{AESTHETIC_SCORE:g}, and {NEGATIVE_AESTHETIC_SCORE:g} for the unconditional branch"
        )
    if config.loras:
        facts["LoRA"] = ", ".join(
            f"{public_name(lora.path)} × {lora.scale:g}" for lora in config.loras
        )
    if config.adapt is not None:
        learnt = [f"low-rank weights of rank {config.adapt.rank}"] if config.adapt.rank else []
        if tokens := config.adapt.class_tokens:
            learnt.append(f"{count_of(tokens, 'class token')} in the place of each class name")
        facts["adapted"] = (
            f"{' and '.join(learnt)}, {config.adapt.steps} steps on the real training images"
        )
    return facts


MOST_NAMED = 12
"""Thresholds of single levels and classes that a text names, at most."""


def _filter(config: Filter) -> str:
    clip = public_name(config.checkpoint)
    if config.rule == "alia":
        return (
            f"ALIA's two filters (arXiv 2305.16289) drop images that {clip} finds closer to a text "
            f"that fits any picture than to “{config.positive or config.template}”, and images "
            "that a classifier of the real images finds too easy or mislabelled"
        )
    threshold = f"{config.threshold:g}".replace("-", "−")
    text = f"clip_similarity ≥ {threshold} with “{config.template}”, by {clip}"
    own = {f"level {format_level(level)}": each for level, each in config.level_thresholds.items()}
    own |= {f"class {name}": each for name, each in config.class_thresholds.items()}
    if own:
        named = [f"{each:g} for {name}" for name, each in own.items()]
        text += f", but {list_some(named, MOST_NAMED)}"
    if config.rule == "difficulty":
        low, high = config.band or BAND
        text += (
            f"; and a probability of the class from {low:g} to {high:g} by a classifier of the "
            "real images, cross-fitted, with all classes equally likely"
        )
    return text
