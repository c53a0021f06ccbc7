"""Checkpoints: saved in the background, whole or absent, checked before use, on any mesh.

A folder of checkpoints holds one folder per step. Format version 2:

    checkpoints/step_200/
      manifest.json     what is here: version, step, arrays (shape, dtype), files (bytes, sha256)
      arrays/           the arrays, written by Orbax (OCDBT + zarr3, not compressed, logical shapes)
      config.json ...   small files that the caller gave as bytes

A step is written as `.saving-step_200.1` (the last number counts attempts) and renamed when every
file and folder in it is on disk, so `step_200` is whole or absent whatever kills the process.
Whatever is older and no longer kept is renamed to `.deleted-step_N` before it is removed. Under
these names are leftovers of a killed process: readers ignore them, `clean_leftovers` removes them.

Only what the manifest lists is a checkpoint's: it is damaged where one of these files is missing or
changed, or where there is another one under a name that Orbax or TensorStore would read. All other
files, those of file managers and editors, say, are harmless: they are told of and left alone. A
file that cannot be read for the moment (OSError) is an error, and no damage.

A step that a run passed over is moved to `aside/step_N` by the first save after it (`step_N.1`
where that name is taken). Nothing looks for steps there. It is deleted when retention would have
deleted a good step N: when `keep` newer ones are complete, and for a multiple of `keep_every` when
another step N is. A file or link under a step's name is moved there too, and one that is named
`aside` becomes `aside.1`: neither keeps a step from being saved, and no link's target is touched.

`manifest.json` is canonical JSON (sorted keys, indent 1) with its own SHA-256 under `sha256`, taken
over the same JSON without that key. A version above this one's is refused. In version 1 the arrays
have other names (`format_1.py`); it is read under those of today.

Arrays that the caller marks as stacked are `[L, ...]` and no chunk of them spans two layers, so one
layer can be read or written alone; an array that is not sharded has exactly one chunk a layer.
Other arrays are cut into chunks of at most 64 MB.

Orbax takes no chunk shape, but splits storage along chosen dims down to size 1: dim 0, here. An
array that is sharded over devices has one chunk a layer and shard, whichever process holds it.
`LayerWriter` writes a checkpoint a layer at a time, and cuts what is no stack into chunks of rows.

Several processes must see the same file system. All call `save`, `wait` and `restore` together;
process 0 writes the small files, the checksums and the manifest.
"""

from meshlm.checkpoint.disk import check_free_disk, estimate_bytes
from meshlm.checkpoint.folder import (
    clean_leftovers,
    complete_steps,
    latest_complete,
    step_of,
    step_path,
    steps_aside,
)
from meshlm.checkpoint.layers import LayerReader, LayerWriter, add_file
from meshlm.checkpoint.manifest import (
    FORMAT_VERSION,
    ArrayInfo,
    Damage,
    FileInfo,
    Manifest,
    read_files,
    read_manifest,
    stray_files,
    verify,
)
from meshlm.checkpoint.restoring import (
    Restored,
    describe_strays,
    find_damage,
    latest_good,
    restore,
    restore_latest,
)
from meshlm.checkpoint.saving import Checkpointer, is_layer_stack

__all__ = [
    "FORMAT_VERSION",
    "ArrayInfo",
    "Checkpointer",
    "Damage",
    "FileInfo",
    "LayerReader",
    "LayerWriter",
    "Manifest",
    "Restored",
    "add_file",
    "check_free_disk",
    "clean_leftovers",
    "complete_steps",
    "describe_strays",
    "estimate_bytes",
    "find_damage",
    "is_layer_stack",
    "latest_complete",
    "latest_good",
    "read_files",
    "read_manifest",
    "restore",
    "restore_latest",
    "step_of",
    "step_path",
    "steps_aside",
    "stray_files",
    "verify",
]
