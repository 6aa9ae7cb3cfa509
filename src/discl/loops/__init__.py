"""The curriculum in other people's training loops: plain PyTorch, Hugging Face's Trainer, Lightning."""
