"""A curriculum in Hugging Face's Trainer.

    python examples/hf_trainer.py RUN_FOLDER [STRATEGY] [EPOCHS]

RUN_FOLDER is a run that has passed the filter:

    discl filter fashion-lt --out runs/fashion-lt
"""

import sys
import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

import discl
from discl.integrations.huggingface import CurriculumTrainer


def collate(samples: list) -> dict[str, torch.Tensor]:
    images, labels, _levels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def main(
    folder: str,
    strategy: str = "adaptive",
    epochs: int = 12,
    out: str | None = None,
    resume: bool = False,
) -> CurriculumTrainer:
    """Trains a small network of transformers; returns its trainer, evaluated on validation."""
    torch.manual_seed(0)
    dataset = discl.SpectrumDataset.of_run(folder, size=32)
    curriculum = discl.Curriculum(
        dataset, strategy, curriculum_epochs=epochs * 2 // 3, collate=collate
    )
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[24, 48],
        depths=[1, 1],
        layer_type="basic",
        num_labels=len(dataset.class_names),
    )
    # with several processes the Trainer shards the rows; CurriculumTrainer sets the curriculum so
    trainer = CurriculumTrainer(
        curriculum=curriculum,
        model=ResNetForImageClassification(config),
        args=TrainingArguments(
            out or tempfile.mkdtemp(),
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            save_strategy="epoch",
            logging_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        eval_dataset=discl.SpectrumDataset.of_run(folder, size=32, split="validation"),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    print(trainer.evaluate())
    return trainer


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:2], *map(int, arguments[2:3]))
