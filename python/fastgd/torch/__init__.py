"""torch.optim's classes, stepped in one pass: change an import and keep the rest."""

from fastgd.torch.optimizers import SGD, Adagrad, Adam, AdamW, Lion, RMSprop

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop"]
