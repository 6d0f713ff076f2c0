"""Training: adapters on plain or quantised bases, all weights, and preferences, by one loop."""

from gemlax.tune.run import Result, Settings, train
from gemlax.tune.train import Measured, Recipe, Trainer

__all__ = ["Measured", "Recipe", "Result", "Settings", "Trainer", "train"]
