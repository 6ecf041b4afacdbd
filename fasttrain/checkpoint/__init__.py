"""Checkpoints that are whole or absent, verified to the last byte, and never executed.

A checkpoint is a folder of safetensors and text files, sealed by `manifest.json`:

    step-00001000/  model.safetensors  optimizer.safetensors …   one file a group of tensors
                    state.json  config.toml                  (several ranks: ranks.py)
                    manifest.json   bytes and SHA-256 of each file, and of the manifest itself

Commit protocol: every file is written into `.tmp-…` beside its place and fsynced; so is the folder;
then it is renamed, the parent is fsynced, and only then do the pointers `latest` and `best` (text
files with a folder's name) move, each by write, fsync, rename, fsync. A step that is saved again
moves the older folder to `.old-…` for that moment; readers take it if its successor is missing.

The training thread is held for one copy of the tensors into reused host buffers that are laid out
as the files are. The background thread hashes them and writes them past the page cache as they lie.

`python -m fasttrain.checkpoint PATH` lists and verifies a checkpoint or all those of a run.
"""

from fasttrain.checkpoint.files import CheckpointError
from fasttrain.checkpoint.reading import (
    Checkpoint,
    check_model,
    load,
    parse,
    resolve,
    saved_parameters,
    verify,
)
from fasttrain.checkpoint.writer import CheckpointWriter, refuse_unsavable

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "check_model",
    "load",
    "parse",
    "refuse_unsavable",
    "resolve",
    "saved_parameters",
    "verify",
]
