"""A curriculum in a plain loop: rows of every epoch, progress, resuming, data workers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import discl
from discl.cli import main
from discl.curriculum.progress import best_level
from discl.curriculum.sampling import Pool, draw_epoch
from discl.errors import DataError, RunError, StoreError, TrainingError
from discl.integrations import sampler as curriculum_module
from discl.run_folder.run import Run
from discl.training.distributed import Processes
from discl.utils.hashing import derive_seed

REAL, HARD, EACH = 40, 8, 16


@pytest.fixture(scope="module")
def dataset(filtered_run: Path) -> discl.SpectrumDataset:
    return discl.SpectrumDataset.of_run(filtered_run, size=16)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))


def train(curriculum: discl.Curriculum, epochs: range, model: nn.Module) -> list[list[int]]:
    """Rows of each epoch of a plain loop."""
    loader = DataLoader(curriculum.dataset, 8, sampler=curriculum)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    drawn = []
    for epoch in epochs:
        curriculum.begin(epoch, model)
        drawn.append(list(curriculum))
        for images, labels, _ in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return drawn


# ---------------------------------------------------------------- the data set


def test_a_run_is_one_data_set_of_real_and_kept_images(filtered_run: Path) -> None:
    dataset = discl.SpectrumDataset.of_run(filtered_run)
    assert len(dataset) == REAL + 2 * EACH
    assert dataset.pool.hard.sum() == HARD and dataset.pool.synthetic.sum() == 2 * EACH
    real, made = dataset[0], dataset[REAL]
    assert (
        isinstance(real.image, Image.Image)
        and real.level == 100
        and real.label == dataset.pool.labels[0]
    )
    assert made.level in {0, 50} and dataset.class_names[made.label] in {"coat", "hat"}
    assert dataset[-1].level == dataset.pool.levels[-1]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    pixels = discl.SpectrumDataset.of_run(filtered_run, size=16, transform=lambda image: 2 * image)[
        0
    ].image
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert torch.equal(pixels, 2 * discl.SpectrumDataset.of_run(filtered_run, size=16)[0].image)
    other = discl.SpectrumDataset.of_run(filtered_run, split="validation")
    assert len(other) == 12 and not other.pool.synthetic.any()


def test_a_folder_of_shards_and_real_images_is_the_same_data_set(filtered_run: Path) -> None:
    whole = discl.SpectrumDataset.of_run(filtered_run, size=16)
    train = Run(discl.load_recipe(filtered_run / "recipe.yaml"), filtered_run).train
    shards = discl.SpectrumDataset.of_shards(filtered_run / "spectrum", train, size=16)
    key = [
        (label, level) for label, level in zip(whole.pool.labels, whole.pool.levels, strict=True)
    ]
    assert sorted(key) == sorted(zip(shards.pool.labels, shards.pool.levels, strict=True))
    assert np.array_equal(whole.pool.hard, shards.pool.hard)
    some = discl.SpectrumDataset.of_shards(
        filtered_run / "spectrum", train, keep=set(whole.synthetic["id"][:5])
    )
    assert some.pool.synthetic.sum() == 5


def test_what_is_lacking_is_said(filtered_run: Path, tmp_path: Path) -> None:
    train = Run(discl.load_recipe(filtered_run / "recipe.yaml"), filtered_run).train
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        discl.SpectrumDataset.of_run(tmp_path)
    with pytest.raises(DataError, match="unknown split 'tset'"):
        discl.SpectrumDataset.of_run(filtered_run, split="tset")
    with pytest.raises(StoreError, match="no Parquet shard"):
        discl.SpectrumDataset.of_shards(tmp_path, train)
    with pytest.raises(DataError, match=r"^hard: got 1 values for 40"):
        discl.SpectrumDataset.of_shards(filtered_run / "spectrum", train, hard=[True])
    with pytest.raises(DataError, match=r"^hard: missing"):
        discl.SpectrumDataset.of_shards(filtered_run / "spectrum", train.select(range(20)))


# ---------------------------------------------------------------- the epochs


def test_epochs_follow_the_strategy_as_training_does(dataset: discl.SpectrumDataset) -> None:
    curriculum = discl.Curriculum(
        dataset, "diverse-to-specific", curriculum_epochs=4, samples=24, seed=3
    )
    seen = []
    for epoch in range(6):
        curriculum.set_epoch(epoch)
        rows = list(curriculum)
        seen.append(curriculum.levels)
        levels = tuple(curriculum.levels)
        alone, _ = draw_epoch(
            dataset.pool,
            levels,
            curriculum.schedule.sampling,
            24,
            seed=derive_seed("mix", 3, epoch),
        )
        assert rows == alone.tolist() and len(curriculum) == 24
        assert set(dataset.pool.levels[rows]) <= {100, *curriculum.levels}
    assert seen == [(0,), (0,), (50,), (50,), (), ()]
    curriculum.set_epoch(2)  # any epoch, in any order
    assert curriculum.levels == (50,)


def test_a_level_switch_restarts_no_worker(filtered_run: Path) -> None:
    dataset = discl.SpectrumDataset.of_run(filtered_run, transform=lambda image: os.getpid())
    curriculum = discl.Curriculum(dataset, "diverse-to-specific", curriculum_epochs=2, samples=32)
    loader = DataLoader(dataset, 4, sampler=curriculum, num_workers=2, persistent_workers=True)
    pids: list[set[int]] = []
    levels = []
    for epoch in range(3):
        curriculum.set_epoch(epoch)
        levels.append(curriculum.levels)
        batches = list(loader)
        pids.append({pid for batch in batches for pid in batch.image.tolist()})
        assert {level for batch in batches for level in batch.level.tolist()} == {
            100,
            *curriculum.levels,
        }
    assert levels == [(0,), (50,), ()]
    assert len(pids[0]) == 2 and pids[0] == pids[1] == pids[2] and os.getpid() not in pids[0]


def test_adaptive_probes_then_follows_what_was_measured(dataset: discl.SpectrumDataset) -> None:
    curriculum = discl.Curriculum(
        dataset, "adaptive", curriculum_epochs=6, probe_every=3, samples=16, guidance_images=3
    )
    drawn = train(curriculum, range(9), make_model())
    pool, held = dataset.pool, set(curriculum.guidance_rows.tolist())
    assert held and not held & {row for rows in drawn for row in rows}
    assert len(curriculum.history) == 2
    for block, record in enumerate(curriculum.history):
        probe, *others = drawn[3 * block : 3 * block + 3]
        assert not pool.synthetic[probe].any() and len(set(probe)) == 16
        assert record["levels"] == [best_level(record["progress"]["gain"])]
        for rows in others:
            made = pool.synthetic[rows]
            assert made.any() and set(pool.levels[rows][made]) == set(record["levels"])
            assert not pool.hard[rows].any()  # algorithm 2: S_λ ∪ D_nh
    assert not pool.synthetic[np.concatenate(drawn[6:])].any()


@pytest.mark.parametrize("strategy", ["adaptive", "bandit"])
def test_nothing_of_the_sources_of_v_is_drawn(
    filtered_run: Path, dataset: discl.SpectrumDataset, strategy: str
) -> None:
    """Neither the real images that V's nearly copy nor their siblings, from a run's data set and
    from shards."""
    train_table = Run(discl.load_recipe(filtered_run / "recipe.yaml"), filtered_run).train
    shards = discl.SpectrumDataset.of_shards(filtered_run / "spectrum", train_table, size=16)
    for each in (dataset, shards):
        with pytest.warns(UserWarning, match="guidance_images = 4, but V holds 3"):
            curriculum = discl.Curriculum(
                each, strategy, curriculum_epochs=6, probe_every=2, samples=64, guidance_images=4
            )
        pool = each.pool
        rows = curriculum.guidance_rows
        held = pool.sources[rows]
        assert sorted(pool.levels[rows].tolist()) == [0] * 3 + [50] * 3
        assert len(set(held.tolist())) == 3 and pool.hard[held].all()
        drawn = np.unique(np.concatenate(train(curriculum, range(8), make_model())))
        assert pool.hard[drawn].any() and pool.synthetic[drawn].any()
        assert not set(held.tolist()) & set(pool.sources[drawn].tolist())


def test_shards_without_sources_measure_nothing(filtered_run: Path, tmp_path: Path) -> None:
    train_table = Run(discl.load_recipe(filtered_run / "recipe.yaml"), filtered_run).train
    files = sorted((filtered_run / "spectrum").glob("*.parquet"))
    for file in files:
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(["source_id"]), tmp_path / file.name)
    hard = discl.SpectrumDataset.of_run(filtered_run).pool.hard[: len(train_table)].tolist()
    bare = discl.SpectrumDataset.of_shards(tmp_path, train_table, hard=hard, size=16)
    assert len(discl.Curriculum(bare, "all-levels", curriculum_epochs=2, samples=16)) == 16
    with pytest.raises(TrainingError, match=r"32 synthetic images .* source_id"):
        discl.Curriculum(bare, "adaptive", curriculum_epochs=2)


def test_progress_is_the_change_of_the_users_own_probability(
    dataset: discl.SpectrumDataset,
) -> None:
    """Probabilities are .1 before the probe and .1 + λ / 1000 after it: level 50 gains .05."""
    calls: list[int] = []

    def probability(model: nn.Module, batch: Any) -> torch.Tensor:
        assert not model.training
        calls.append(len(batch.label))
        return 0.1 + (batch.level / 1000 if len(calls) > 1 else 0 * batch.level)

    model = make_model()
    curriculum = discl.Curriculum(
        dataset,
        "adaptive",
        curriculum_epochs=2,
        probe_every=2,
        guidance_images=3,
        probability=probability,
    )
    curriculum.begin(0, model)
    assert model.training and curriculum.levels == ()
    curriculum.begin(1, model)
    assert curriculum.levels == (50,) and len(calls) == 2
    assert curriculum.state_dict()["record"]["progress"]["gain"] == pytest.approx(
        {"0": 0.0, "50": 0.05}
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["adaptive", "adaptive-per-class", "bandit", "random"])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_resumed_draws_what_it_would_have_drawn(
    dataset: discl.SpectrumDataset, strategy: str, stop: int
) -> None:
    def make() -> discl.Curriculum:
        return discl.Curriculum(
            dataset, strategy, curriculum_epochs=6, probe_every=2, samples=16, guidance_images=3
        )

    whole = train(make(), range(8), make_model())
    first, model = make(), make_model()
    head = train(first, range(stop), model)
    first.end(model)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + train(resumed, range(stop, 8), model) == whole


@pytest.mark.parametrize("strategy", ["adaptive", "bandit"])
def test_after_an_epochs_end_the_next_one_is_drawn_before_it_begins(
    dataset: discl.SpectrumDataset, strategy: str
) -> None:
    """As Lightning's data workers do when it resumes."""

    def make() -> discl.Curriculum:
        return discl.Curriculum(
            dataset, strategy, curriculum_epochs=6, probe_every=3, samples=16, guidance_images=3
        )

    curriculum, model = make(), make_model()
    states, drawn = [], []
    for epoch in range(8):
        drawn += train(curriculum, range(epoch, epoch + 1), model)
        curriculum.end(model)
        states.append(json.loads(json.dumps(curriculum.state_dict())))
    for epoch, state in enumerate(states[:-1]):
        resumed = make()
        resumed.load_state_dict(state)
        assert list(resumed) == drawn[epoch + 1]
        resumed.set_epoch(epoch + 1)
        assert list(resumed) == drawn[epoch + 1]


@pytest.mark.parametrize(
    "epochs, synthetic",
    [(8, [1, 2, 3, 5, 6, 7]), (10, [1, 2, 3, 5, 6, 7, 9]), (9, [1, 2, 3, 5, 6, 7]), (3, [1, 2])],
)
def test_no_synthetic_image_after_the_curriculum(
    dataset: discl.SpectrumDataset, epochs: int, synthetic: list[int]
) -> None:
    """Blocks of a probe and three epochs do not divide 10, 9 or 3 epochs."""
    model = make_model()
    curriculum = discl.Curriculum(
        dataset, "adaptive", curriculum_epochs=epochs, samples=16, guidance_images=3
    )
    drawn = []
    for epoch in range(14):
        curriculum.begin(epoch, model)
        drawn.append(bool(dataset.pool.synthetic[curriculum.rows()].any()))
    assert [epoch for epoch, made in enumerate(drawn) if made] == synthetic


@pytest.mark.parametrize(("hard", "others"), [((2, 3), False), ((0, 2), True)])
def test_easy_images_are_left_out_only_beside_whole_classes(
    hard: tuple[int, ...], others: bool
) -> None:
    """Where single images of every class are hard, undersampling would drop all others."""
    labels = np.repeat([0, 1, 2, 3], [8, 8, 2, 2]) if not others else np.repeat([0, 1], 10)
    marked = np.isin(labels, hard) if not others else np.isin(np.arange(20), (0, 10))
    made = np.repeat(np.flatnonzero(marked), 4)
    pool = Pool(
        np.r_[labels, labels[made]],
        np.r_[np.full(20, 100), np.full(len(made), 50)],
        np.repeat([False, True], [20, len(made)]),
        np.r_[marked, np.zeros(len(made), bool)],
        ("a", "b", "c", "d")[: labels.max() + 1],
    )
    dataset: Any = SimpleNamespace(pool=pool)
    drawn = discl.Curriculum(dataset, "fixed", level=50, curriculum_epochs=2, samples=26).rows()
    easy = ~pool.hard & ~pool.synthetic
    if others:
        assert set(np.flatnonzero(easy)) <= set(drawn)
        with pytest.raises(TrainingError, match="2 classes has hard images") as raised:
            discl.Curriculum(dataset, "fixed", level=50, curriculum_epochs=2, undersample=True)
        assert raised.value.argument == "undersample"
    else:
        assert easy[drawn].mean() == pytest.approx(1 - pool.tail_share, abs=0.1)


def test_level_100_is_the_real_image_once_more(dataset: discl.SpectrumDataset) -> None:
    curriculum = discl.Curriculum(dataset, "fixed", level=100, curriculum_epochs=2, samples=64)
    rows = curriculum.rows()
    assert not dataset.pool.synthetic[rows].any()
    plain = discl.Curriculum(
        dataset, "real-only", curriculum_epochs=2, samples=64, undersample=False
    ).rows()
    assert dataset.pool.hard[rows].mean() > 1.5 * dataset.pool.hard[plain].mean()


# ---------------------------------------------------------------- measuring


def test_progress_is_measured_without_the_random_transform(filtered_run: Path) -> None:
    def noisy(image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand(())

    def brightness(model: nn.Module, batch: Any) -> torch.Tensor:
        return batch.image.mean((1, 2, 3))

    with pytest.raises(
        TrainingError,
        match=r"^evaluation_transform: missing",
    ):
        discl.Curriculum(
            discl.SpectrumDataset.of_run(filtered_run, size=16, transform=noisy),
            "adaptive",
            curriculum_epochs=2,
        )
    discl.Curriculum(
        discl.SpectrumDataset.of_run(filtered_run, size=16, transform=noisy), curriculum_epochs=2
    )  # measures nothing
    dataset = discl.SpectrumDataset.of_run(
        filtered_run, size=16, transform=noisy, evaluation_transform=nn.Identity()
    )
    curriculum = discl.Curriculum(
        dataset,
        "adaptive",
        curriculum_epochs=2,
        probe_every=2,
        guidance_images=3,
        probability=brightness,
    )
    curriculum.begin(0, make_model())
    curriculum.begin(1, make_model())
    assert curriculum.state_dict()["record"]["progress"]["gain"] == {"0": 0.0, "50": 0.0}
    assert not torch.equal(dataset[0].image, dataset[0].image)
    plain, view = discl.SpectrumDataset.of_run(filtered_run, size=16), dataset.for_evaluation()
    assert torch.equal(view[0].image, plain[0].image) and plain.for_evaluation()[0].level == 100
    train = Run(discl.load_recipe(filtered_run / "recipe.yaml"), filtered_run).train
    shards = discl.SpectrumDataset.of_shards(
        filtered_run / "spectrum", train, transform=noisy, evaluation_transform=lambda image: "seen"
    )
    assert shards.for_evaluation()[0].image == "seen"


class Cosines(nn.Module):
    """Logits as a CLIP has them, 30 times a cosine."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3 * 16 * 16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 30 * F.linear(F.normalize(images.flatten(1)), F.normalize(self.weight))


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    """A function that gives accelerate's Accelerator on the CPU; its state, one for a process, is
    reset."""
    accelerate = pytest.importorskip("accelerate")

    def make(**given: Any) -> Any:
        accelerate.state.AcceleratorState._reset_state(True)
        return accelerate.Accelerator(cpu=True, **given)

    yield make
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("how", ["autocast", "accelerate"])
def test_progress_is_measured_in_float32_under_mixed_precision(
    dataset: discl.SpectrumDataset, accelerator: Callable[..., Any], how: str
) -> None:
    """The change of one step at a small rate, which bfloat16 rounds to nothing for most images."""

    def measure(model: nn.Module, autocast: bool) -> list[dict[str, float]]:
        curriculum = discl.Curriculum(
            dataset, "adaptive", curriculum_epochs=8, probe_every=2, samples=16, guidance_images=3
        )
        torch.manual_seed(0)
        for epoch in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                curriculum.begin(epoch, model)
            with torch.no_grad():  # the same steps for all
                inner.weight += 1e-3 * torch.randn(inner.weight.shape)
        return [record["progress"]["gain"] for record in curriculum.history]

    inner = Cosines()
    exact = measure(inner, autocast=False)
    inner = Cosines()
    model = accelerator(mixed_precision="bf16").prepare(inner) if how == "accelerate" else inner
    images = torch.stack([dataset[row].image for row in range(8)])
    assert measure(model, autocast=how == "autocast") == exact
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        coarse = model(images)
    assert not torch.equal(coarse.float(), Cosines.forward(inner, images)), (
        "it computes in bfloat16"
    )


def test_a_model_of_bfloat16_weights_is_measured_as_it_is(dataset: discl.SpectrumDataset) -> None:
    model = make_model().to(torch.bfloat16)
    curriculum = discl.Curriculum(
        dataset, "adaptive", curriculum_epochs=2, probe_every=2, guidance_images=3
    )
    with torch.autocast("cpu", torch.bfloat16):
        curriculum.begin(0, model)
        curriculum.begin(1, model)
    assert set(curriculum.state_dict()["record"]["progress"]["gain"]) == {"0", "50"}


# ---------------------------------------------------------------- loaders that count for themselves


@pytest.mark.parametrize("strategy", ["diverse-to-specific", "random", "adaptive", "bandit"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_with_a_prepared_loader_it_goes_on_where_it_was(
    dataset: discl.SpectrumDataset, accelerator: Callable[..., Any], strategy: str, stop: int
) -> None:
    """The loader counts from 0 again and calls `set_epoch` with that whenever it is gone
    through."""

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, row: int) -> tuple[torch.Tensor, int, int]:
            image, label, _ = dataset[row]
            return image, label, row

        def __len__(self) -> int:
            return len(dataset)

    def run(
        epochs: range, state: dict[str, Any] | None = None, weights: Any = None
    ) -> tuple[list[list[int]], dict[str, Any], Any]:
        curriculum = discl.Curriculum(
            dataset,
            strategy,
            curriculum_epochs=6,
            probe_every=3,
            samples=16,
            guidance_images=3,
            rank=0,
            world_size=1,
        )
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loader, model, optimizer = accelerator().prepare(
            DataLoader(Rows(), 8, sampler=curriculum), model, optimizer
        )
        if state is not None:
            curriculum.load_state_dict(state)
            model.load_state_dict(weights)
        drawn = []
        for epoch in epochs:
            curriculum.begin(epoch, model)
            seen = []
            for images, labels, rows in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
                seen += rows.tolist()
            assert seen == list(curriculum)
            drawn.append(seen)
        curriculum.end(model)
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return drawn, json.loads(json.dumps(curriculum.state_dict())), kept

    whole, _, _ = run(range(8))
    head, state, weights = run(range(stop))
    rest, _, _ = run(range(stop, 8), state, weights)
    assert head + rest == whole


def test_begin_holds_whatever_a_loader_counts(dataset: discl.SpectrumDataset) -> None:
    curriculum = discl.Curriculum(dataset, "diverse-to-specific", curriculum_epochs=4, samples=16)
    curriculum.begin(3)
    wanted = curriculum.rows().tolist()
    for counted in (0, 3, 5):
        curriculum.set_epoch(counted)
        assert curriculum.epoch == 3 and curriculum.rows().tolist() == wanted
    list(curriculum)
    with pytest.warns(UserWarning, match=r"set_epoch\(1\) has no effect: begin\(3\) holds"):
        curriculum.set_epoch(1)
    curriculum.end()
    curriculum.set_epoch(4)  # Lightning does so before it begins the next
    assert curriculum.epoch == 4 and curriculum.levels == ()


def test_a_state_of_another_guidance_set_is_refused(dataset: discl.SpectrumDataset) -> None:
    def make(images: int) -> discl.Curriculum:
        return discl.Curriculum(dataset, "adaptive", curriculum_epochs=4, guidance_images=images)

    first = make(3)
    first.begin(0, make_model())
    with pytest.raises(TrainingError, match="measurements on 6 images, and V has 2"):
        make(1).load_state_dict(first.state_dict())
    make(3).load_state_dict(first.state_dict())


def test_a_loaded_state_is_not_counted_back(dataset: discl.SpectrumDataset) -> None:
    first = discl.Curriculum(dataset, "diverse-to-specific", curriculum_epochs=4, samples=16)
    first.begin(2)
    first.end()
    resumed = discl.Curriculum(dataset, "diverse-to-specific", curriculum_epochs=4, samples=16)
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(TrainingError, match=r"set_epoch\(0\) after a state of epoch 3"):
        resumed.set_epoch(0)
    resumed.set_epoch(3)
    resumed.begin(0)
    assert resumed.levels == (0,)


# ---------------------------------------------------------------- several processes


def test_each_process_draws_its_share(
    dataset: discl.SpectrumDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(**given: Any) -> discl.Curriculum:
        return discl.Curriculum(dataset, "all-levels", curriculum_epochs=2, samples=26, **given)

    whole = list(make())
    shares = [list(make(rank=rank, world_size=4)) for rank in range(4)]
    assert (
        [len(share) for share in shares]
        == [6] * 4
        == [len(make(rank=rank, world_size=4)) for rank in range(4)]
    )
    assert [row for step in zip(*shares, strict=True) for row in step] == whole[:24]
    late = make()
    monkeypatch.setattr(curriculum_module, "current_processes", lambda: Processes(1, 2))
    assert (
        list(late) == whole[1::2] and len(late) == 13
    )  # torch.distributed was initialised after it was made
    assert list(make(rank=0, world_size=1)) == whole
    for given, argument in (
        ({"rank": 1}, "world_size"),
        ({"world_size": 1}, "rank"),
        ({"rank": 2, "world_size": 2}, "rank"),
    ):
        with pytest.raises(TrainingError) as raised:
            make(**given)
        assert raised.value.argument == argument
    with pytest.raises(TrainingError, match="26 leaves no row"):
        len(make(rank=0, world_size=27))


def test_frameworks_that_divide_rows_get_all_of_them(
    dataset: discl.SpectrumDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.data_loader import prepare_data_loader

    from discl.integrations.huggingface import CurriculumCallback

    curriculum = discl.Curriculum(dataset, "all-levels", curriculum_epochs=2, samples=24)
    whole = list(curriculum)
    monkeypatch.setattr(curriculum_module, "current_processes", lambda: Processes(1, 2))
    CurriculumCallback(curriculum)
    rows: Any = range(len(dataset))
    loaders = [DataLoader(rows, 4, sampler=curriculum) for _ in range(2)]
    shares = [
        prepare_data_loader(each, num_processes=2, process_index=rank, put_on_device=False)
        for rank, each in enumerate(loaders)
    ]
    batches = [[batch.tolist() for batch in each] for each in shares]
    assert [row for step in zip(*batches, strict=True) for batch in step for row in batch] == whole
    pytest.importorskip("lightning")
    from discl.integrations import lightning as lightning_module

    for divided, mine in ((True, whole), (False, whole[1::2])):
        trainer = SimpleNamespace(
            _accelerator_connector=SimpleNamespace(use_distributed_sampler=divided),
            global_rank=1,
            world_size=2,
        )
        lightning_module.CurriculumCallback(curriculum).setup(trainer, None, "fit")
        assert list(curriculum) == mine


def share_training(rank: int, dataset: discl.SpectrumDataset, folder: str) -> None:
    """One of two processes whose models differ, so that what they measure by themselves would."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    curriculum = discl.Curriculum(
        dataset, "adaptive", curriculum_epochs=4, probe_every=2, samples=16, guidance_images=3
    )
    drawn = train(curriculum, range(3), model)
    curriculum.end(model)
    state = json.loads(json.dumps(curriculum.state_dict()))
    resumed = discl.Curriculum(
        dataset, "adaptive", curriculum_epochs=4, probe_every=2, samples=16, guidance_images=3
    )
    resumed.load_state_dict(state)
    drawn += train(resumed, range(3, 5), model)
    Path(folder, f"{rank}.json").write_text(
        json.dumps({"drawn": drawn, "state": state, "history": resumed.history})
    )
    dist.destroy_process_group()


def test_processes_follow_what_the_first_one_measured(
    dataset: discl.SpectrumDataset, tmp_path: Path
) -> None:
    torch.multiprocessing.start_processes(
        share_training, (dataset, str(tmp_path)), nprocs=2, start_method="fork"
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["history"] == second["history"] and len(first["history"]) == 2
    assert first["state"] == second["state"]
    alone = discl.Curriculum(
        dataset, "adaptive", curriculum_epochs=4, probe_every=2, samples=16, guidance_images=3
    )
    alone.load_state_dict(first["state"])
    assert (
        alone.rows()[::2].tolist() == first["drawn"][3]
        and alone.rows()[1::2].tolist() == second["drawn"][3]
    )
    with pytest.raises(
        TrainingError, match=r"cannot agree on progress before torch\.distributed is initialised"
    ):
        discl.Curriculum(dataset, "adaptive", curriculum_epochs=4, rank=0, world_size=2).begin(
            0, make_model()
        )


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("shortage", "caps", r"'caps'; known: cap, repeat\. Did you mean 'cap'"),
        ("missing", "neerest", r"'neerest'; known: error, nearest\. Did you mean 'nearest'"),
        ("synthetic_scale", -1.0, r"got -1\.0; use 0 or more"),
        ("synthetic_scale", float("nan"), "got nan"),
        ("samples", 0, r"got 0; use 1 or more"),
        ("batch_size", 0, r"got 0; use 1 or more"),
        ("curriculum_epochs", -1, r"got -1; use 0 or more"),
        ("guidance_images", 0, r"got 0; use 1 or more"),
        ("probe_every", 1, r"got 1; use 2 or more"),
    ],
)
def test_a_wrong_value_is_refused_by_its_argument(
    dataset: discl.SpectrumDataset, argument: str, value: Any, allowed: str
) -> None:
    arguments = {"strategy": "all-levels", "curriculum_epochs": 2, argument: value}
    with pytest.raises(TrainingError, match=allowed) as raised:
        discl.Curriculum(dataset, **arguments)
    assert raised.value.argument == argument


def test_one_wrong_value_has_the_name_that_its_reader_knows(
    dataset: discl.SpectrumDataset,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The recipe's key on the command line, the argument in the library; the sentence is one."""
    with pytest.raises(discl.RecipeError) as raised:
        discl.Curriculum(dataset, "diverse-to-specific", curriculum_epochs=1)
    name, _, sentence = str(raised.value).partition(": ")
    assert name == raised.value.argument == "curriculum_epochs"
    assert sentence.startswith("got 1, too short for a stage of each of the 2 levels")
    changes = ["train.curriculum_epochs=1", "spectrum.levels=[0,50]"]
    words = [word for change in changes for word in ("--set", change)]
    out = ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["discl", "plan", "fashion-lt", *out, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert f"train.curriculum_epochs: {sentence}" in capsys.readouterr().err


def test_an_argument_of_another_kind_is_named(dataset: discl.SpectrumDataset) -> None:
    for given, argument in (
        ({"strategy": "fixed", "level": 70}, "level"),
        ({"strategy": "fixed"}, "level"),
        ({"strategy": "all-levels", "levels": [0, 30]}, "levels"),
        ({"strategy": "adaptive", "curriculum_epochs": 1}, "curriculum_epochs"),
    ):
        with pytest.raises(TrainingError) as raised:
            discl.Curriculum(dataset, **{"curriculum_epochs": 2, **given})
        assert raised.value.argument == argument
    with pytest.raises(TrainingError, match=r"level 70; this data set has levels 0, 50"):
        discl.Curriculum(dataset, "fixed", level=70, curriculum_epochs=2)


def test_what_cannot_be_followed_is_refused(dataset: discl.SpectrumDataset) -> None:
    with pytest.raises(discl.RecipeError, match="Did you mean 'adaptive'"):
        discl.Curriculum(dataset, "adaptiv", curriculum_epochs=2)
    curriculum = discl.Curriculum(dataset, "adaptive", curriculum_epochs=4, guidance_images=3)
    with pytest.raises(TrainingError, match=r"call begin\(epoch, model\)"):
        curriculum.begin(0)
    with pytest.raises(TrainingError, match="cannot follow epoch 0"):
        curriculum.begin(3, make_model())
    curriculum.set_epoch(1)
    with pytest.raises(TrainingError, match=r"call begin\(1, model\) first"):
        list(curriculum)
    wrong = discl.Curriculum(
        dataset,
        "adaptive",
        curriculum_epochs=4,
        guidance_images=3,
        probability=lambda model, batch: torch.zeros(len(batch.label), 4),
    )
    with pytest.raises(TrainingError, match="one per image"):
        wrong.begin(0, make_model())
