"""Training: adapters on plain or quantised bases, all weights, and preferences, by one loop."""

from gemlax.tune.run import Result, train
from gemlax.tune.settings import TuneSettings
from gemlax.tune.train import Measured, Trainer

__all__ = ["Measured", "Result", "Trainer", "TuneSettings", "train"]
