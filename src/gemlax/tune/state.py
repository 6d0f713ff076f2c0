"""Checkpoints of a run: what is trained, the optimizer's state, and where in the data it is.

Orbax writes each into a folder of its own, under another name until it is whole; what is left of a
write that was cut off is never read, and goes at the next start. Arrays are put back as they were,
bit for bit, over whatever mesh the run goes on with.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemlax.errors import CheckpointError, Error

__all__ = ["Checkpoints"]

_KEPT = 2
_ROOM = 1.1  # files take a little more than arrays


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: Path):
        """The folder is made with the first checkpoint."""
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise Error(
                'training needs orbax-checkpoint; install it with: pip install "gemlax[tune]"'
            ) from error
        self._ocp: Any = ocp
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps after which there is a whole checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())

    def check_room(self, values: Any, optimizer_state: Any) -> None:
        """Check that a checkpoint and what is trained fit on the disk of the folder above."""
        output = self.folder.absolute().parent
        above = next(folder for folder in (output, *output.parents) if folder.exists())
        try:
            _check_free(above, (values, values, optimizer_state))
        except OSError as error:
            raise Error(f"cannot write in {output}: {error}") from error

    def save(self, step: int, values: Any, optimizer_state: Any) -> None:
        """Write a checkpoint; it is there whole or not at all."""
        tree = {"values": values, "optimizer": optimizer_state, "step": np.asarray(step)}
        target = self.folder / str(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            _check_free(self.folder, tree)
            if not target.exists():
                with self._ocp.PyTreeCheckpointer() as checkpointer:
                    checkpointer.save(target.absolute(), tree)
        except Exception as error:  # tensorstore raises what it likes
            self._clean_patiently()
            last = self.steps()
            kept = f"the last good one is of step {last[-1]}" if last else "there is none before it"
            reason = str(error).partition("\n")[0]
            raise Error(f"cannot write the checkpoint of step {step} in {self.folder}: {reason}; "
                        f"{kept}") from error  # fmt: skip
        for old in self.steps()[:-_KEPT]:
            # Renamed first: a folder that is half deleted must not look like a checkpoint.
            gone = self.folder / f"{old}.old"
            (self.folder / str(old)).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def restore(self, step: int, values: Any, optimizer_state: Any) -> tuple[Any, Any]:
        """Return what was saved, in the form and over the devices of what is given."""
        wanted = {"values": values, "optimizer": optimizer_state, "step": np.asarray(0)}
        source = (self.folder / str(step)).absolute()
        try:
            with self._ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(source).item_metadata.tree
                _check_shapes(tree["values"], values, source)
                how = self._ocp.checkpoint_utils.construct_restore_args(wanted)
                restored = checkpointer.restore(source, item=wanted, restore_args=how)
        except CheckpointError:
            raise
        except Exception as error:  # as above
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{source} cannot be read: {reason}") from error
        if int(restored["step"]) != step:
            raise CheckpointError(f"{source} holds step {int(restored['step'])}")
        return restored["values"], restored["optimizer"]

    def _clean_patiently(self) -> None:
        """Clean up after a write that failed: its other threads may still be writing."""
        quiet = 0
        for _ in range(100):
            quiet = 0 if self._leftovers() else quiet + 1
            if quiet == 3:
                return
            self._clean()
            time.sleep(0.05)

    def _leftovers(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if not path.name.isdecimal()]

    def _clean(self) -> None:
        """Remove what is left of writes and removals that were cut off."""
        for path in self._leftovers():
            shutil.rmtree(path, ignore_errors=True)


def _check_shapes(stored: Any, values: Any, source: Path) -> None:
    """Compare a checkpoint's arrays with those of the run, by name."""
    for name in sorted(stored.keys() | values.keys()):
        there, here = (
            list(tree[name].shape) if name in tree else None for tree in (stored, values)
        )
        if there != here:
            raise CheckpointError(
                f"{source} is of another run: {name} is {there} there and {here} here"
            )


def _check_free(folder: Path, tree: Any) -> None:
    need = int(_ROOM * sum(a.nbytes for a in jax.tree.leaves(tree)))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f"the disk is full: {need} bytes are needed and {free} are free")
