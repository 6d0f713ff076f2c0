"""gemlax runs Google's Gemma in JAX: load, quantize, generate, score, save."""

from gemlax.chat import Message
from gemlax.completion import Completion, Stream, TokenLogprob
from gemlax.config import GemmaConfig
from gemlax.decoder import Decoder
from gemlax.errors import CheckpointError, Error, RequestError, UnsupportedError
from gemlax.model import Model, Score, load, load_tokenizer, quantize, save
from gemlax.presets import PRESETS, preset, tiny
from gemlax.session import Reply, Session
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
