"""A curriculum in a plain PyTorch loop.

    python examples/plain_pytorch.py RUN_FOLDER [STRATEGY] [EPOCHS]

RUN_FOLDER is a run that has passed the filter:

    discl filter fashion-lt --out runs/fashion-lt
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

import discl


def make_model(classes: int) -> nn.Module:
    layers = [
        nn.Sequential(nn.LazyConv2d(width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        for width in (24, 48, 96)
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes))


def flip(pixels: torch.Tensor) -> torch.Tensor:
    """Mirrors half of the images. Progress is measured without this random part."""
    return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels


def main(folder: str, strategy: str = "diverse-to-specific", epochs: int = 12) -> float:
    """Trains a small network and returns its accuracy on the validation images."""
    torch.manual_seed(0)
    dataset = discl.SpectrumDataset.of_run(
        folder, size=32, transform=flip, evaluation_transform=nn.Identity()
    )
    curriculum = discl.Curriculum(dataset, strategy, curriculum_epochs=epochs * 2 // 3)
    loader = DataLoader(
        dataset, batch_size=64, sampler=curriculum, num_workers=2, persistent_workers=True
    )
    model = make_model(len(dataset.class_names))
    model(torch.zeros(2, 3, 32, 32))  # fixes the lazy shapes
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        curriculum.begin(epoch, model)
        for images, labels, _levels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: levels {curriculum.levels or 'real only'}, loss {loss.item():.3f}")
    return accuracy(model, discl.SpectrumDataset.of_run(folder, size=32, split="validation"))


@torch.inference_mode()
def accuracy(model: nn.Module, dataset: discl.SpectrumDataset) -> float:
    model.eval()
    right = [model(images).argmax(1) == labels for images, labels, _ in DataLoader(dataset, 256)]
    return torch.cat(right).float().mean().item()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(f"validation accuracy {main(*arguments[:2], *map(int, arguments[2:3])):.3f}")
