"""The examples on a tiny spectrum; checkpoints of Trainer and Lightning hold the curriculum."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("strategy", ["diverse-to-specific", "adaptive"])
def test_plain_pytorch(
    filtered_run: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 0 <= load("plain_pytorch").main(str(filtered_run), strategy, 6) <= 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "levels real only" in lines[-1]
    assert {"levels (0,)", "levels (50,)"} & {
        line.split(": ")[1].split(", loss")[0] for line in lines
    }


@pytest.mark.slow
def test_an_example_is_a_command(filtered_run: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "plain_pytorch.py"),
        str(filtered_run),
        "diverse-to-specific",
        "3",
    ]
    answered = subprocess.run(command, capture_output=True, text=True)
    assert answered.returncode == 0, answered.stderr
    assert "validation accuracy" in answered.stdout


@pytest.mark.slow
def test_hugging_face_trainer(filtered_run: Path, tmp_path: Path) -> None:
    example = load("hf_trainer")
    whole = example.main(str(filtered_run), "adaptive", 9, str(tmp_path / "whole"))
    assert whole.state.epoch == 9
    assert len(whole.curriculum.history) == 2 and all(
        record["progress"] for record in whole.curriculum.history
    )
    for stop in (1, 3):
        kept = tmp_path / "whole" / f"checkpoint-{stop}"  # 40 samples an epoch are one step here
        folder = tmp_path / f"resumed-{stop}"
        shutil.copytree(kept, folder / kept.name)
        resumed = example.main(str(filtered_run), "adaptive", 9, str(folder), resume=True)
        assert resumed.curriculum.history == whole.curriculum.history


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("diverse-to-specific", marks=pytest.mark.slow),
        pytest.param("random", marks=pytest.mark.slow),
        "adaptive",
    ],
)
def test_a_trainer_resumed_draws_what_it_would_have_drawn(
    filtered_run: Path, tmp_path: Path, strategy: str
) -> None:
    """At the end of an epoch and in the middle of one; the Trainer's prepared loader counts from 0
    again."""
    import discl

    example = load("hf_trainer")
    seen: list[int] = []

    class Recording(discl.SpectrumDataset):
        def __getitem__(self, row: int) -> Any:
            if self.transform is not None:  # not where progress is measured
                seen.append(row)
            return super().__getitem__(row)

    def fit(folder: Path, resume: bool) -> tuple[list[int], Any]:
        seen.clear()
        torch.manual_seed(0)
        identity = torch.nn.Identity()
        dataset = Recording.of_run(
            filtered_run, size=32, transform=identity, evaluation_transform=None
        )
        dataset.for_evaluation = lambda: discl.SpectrumDataset.of_run(filtered_run, size=32)
        curriculum = discl.Curriculum(
            dataset,
            strategy,
            curriculum_epochs=4,
            probe_every=2,
            samples=24,
            collate=example.collate,
        )
        config = example.ResNetConfig(
            embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=4
        )
        trainer = example.CurriculumTrainer(
            curriculum=curriculum,
            model=example.ResNetForImageClassification(config),
            train_dataset=dataset,
            args=example.TrainingArguments(
                str(folder),
                num_train_epochs=5,
                per_device_train_batch_size=8,
                save_strategy="steps",
                save_steps=1,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            data_collator=example.collate,
        )
        trainer.train(resume_from_checkpoint=resume)
        return list(seen), curriculum.history

    whole, history = fit(tmp_path / "whole", False)
    assert len(whole) == 5 * 24
    for step in (3, 7):  # an epoch has three
        folder = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        rest, resumed = fit(folder, True)
        assert rest == whole[8 * step :]
        assert resumed == history


@pytest.mark.parametrize(
    "strategy",
    [
        "adaptive",
        pytest.param("bandit", marks=pytest.mark.slow),
        pytest.param("random", marks=pytest.mark.slow),
    ],
)
def test_lightning_resumed_with_workers_draws_what_it_would_have_drawn(
    filtered_run: Path, tmp_path: Path, strategy: str
) -> None:
    lightning = pytest.importorskip("lightning")
    import discl
    from discl.integrations.lightning import CurriculumCallback

    seen: list[tuple[int, list[int]]] = []

    class Recording(load("lightning_trainer").Classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, index: int) -> Any:
            seen.append((self.trainer.current_epoch, batch[2].tolist()))
            return super().training_step(batch, index)

    def fit(
        folder: Path, resume: Path | None = None
    ) -> tuple[list[Any], list[tuple[int, list[int]]]]:
        lightning.seed_everything(0)
        seen.clear()
        dataset = discl.SpectrumDataset.of_run(filtered_run, size=32)
        curriculum = discl.Curriculum(
            dataset, strategy, curriculum_epochs=6, probe_every=3, samples=32
        )
        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            dirpath=folder, filename="{epoch}", save_top_k=-1
        )
        trainer = lightning.Trainer(
            max_epochs=5,
            callbacks=[CurriculumCallback(curriculum), keep],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        loader = torch.utils.data.DataLoader(
            dataset, 16, sampler=curriculum, num_workers=1, persistent_workers=True
        )
        trainer.fit(
            Recording(len(dataset.class_names)), loader, ckpt_path=resume, weights_only=False
        )
        return curriculum.history, list(seen)

    history, whole = fit(tmp_path / "whole")
    for epoch in (0, 2):
        resumed, rest = fit(tmp_path / "resumed", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert resumed == history
        assert rest == [each for each in whole if each[0] > epoch]


@pytest.mark.slow
def test_lightning(filtered_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    example = load("lightning_trainer")
    curriculum, trainer = example.main(str(filtered_run), "adaptive", 9, str(tmp_path / "whole"))
    assert trainer.current_epoch == 9
    assert len(curriculum.history) == 2 and all(record["progress"] for record in curriculum.history)
    _, half = example.main(str(filtered_run), "diverse-to-specific", 3, str(tmp_path / "half"))
    stored = Path(half.checkpoint_callback.best_model_path)
    resumed, longer = example.main(
        str(filtered_run), "diverse-to-specific", 6, str(tmp_path / "half"), str(stored)
    )
    assert longer.current_epoch == 6 and resumed.epoch == 5
    json.dumps(resumed.state_dict())
