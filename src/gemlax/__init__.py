"""gemlax runs Google's Gemma in JAX: load, quantize, generate, score, save."""

from gemlax.chat import Message
from gemlax.config import GemmaConfig
from gemlax.decoder import Decoder
from gemlax.errors import CheckpointError, Error, RequestError, UnsupportedError
from gemlax.generation import (
    Completion,
    Reply,
    SamplingSettings,
    Session,
    Stream,
    TokenLogprob,
)
from gemlax.model import Model, Score, load, load_tokenizer
from gemlax.presets import PRESETS, preset, tiny
from gemlax.saving import quantize, save
from gemlax.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Completion",
    "Decoder",
    "Error",
    "GemmaConfig",
    "Message",
    "Model",
    "Reply",
    "RequestError",
    "SamplingSettings",
    "Score",
    "Session",
    "Stream",
    "TokenLogprob",
    "Tokenizer",
    "UnsupportedError",
    "load",
    "load_tokenizer",
    "preset",
    "quantize",
    "save",
    "tiny",
]
