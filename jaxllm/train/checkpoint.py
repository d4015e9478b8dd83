"""Checkpoints: parameters and optimizer state by Orbax, in the shapes of the model, so that any layout can take them up.

A checkpoint is written beside its place and moved there when it is whole: a process that is killed leaves the one
before. Arrays are stored by the path of each leaf, without the padding of the vocabulary, which depends on the layout.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.program.build import Built, arranged, natural
from jaxllm.program.sharding import Placement
from jaxllm.spec.errors import SpecError

KEPT = 2  # the newest, and the one before it

Tree = Any
Manager = ocp.CheckpointManager


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Manager]:
    """Checkpoints in a folder, which is made. Saving goes on in the background; leaving waits for it."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
    with _told(folder), Manager(folder.absolute(), options=options) as manager:
        yield manager


def save(manager: Manager, step: int, built: Built, parameters: Tree, state: Tree) -> None:
    """Begins to store the state after `step` steps. Raises SpecError when the disk is full or cannot be written."""
    with _told(manager.directory), jax.set_mesh(built.mesh):
        logical, _ = _flat(built, (parameters, state))
        manager.save(step, args=ocp.args.StandardSave(logical))


def finish(manager: Manager) -> None:
    """Waits until what was saved is whole. Raises SpecError when it could not be written."""
    with _told(manager.directory):
        manager.wait_until_finished()


def restore(manager: Manager, step: int, built: Built) -> tuple[Tree, Tree]:
    """Parameters and optimizer state of a checkpoint, on the mesh of `built`. Raises SpecError when it cannot be read."""
    like, treedef = _flat(built, built.arguments[:2])
    try:
        found = manager.restore(step, args=ocp.args.StandardRestore(like))
    except Exception as error:
        folder = Path(str(manager.directory)) / str(step)
        said = " ".join(str(error).split())[:160]
        raise SpecError(
            f"checkpoint {str(folder)!r} cannot be read ({said}); move it away to go on from the one before, if there is."
        ) from error
    with jax.set_mesh(built.mesh):
        paths, _ = jax.tree_util.tree_flatten_with_path(built.arguments[:2])
        leaves = [
            leaf if _is_natural(place := built.place_of(path), held) else _arranged(leaf, place, held)
            for leaf, (path, held) in zip((found[name] for name in like), paths, strict=True)
        ]
    return jax.tree.unflatten(treedef, leaves)


def _flat(built: Built, trees: tuple[Tree, Tree]) -> tuple[dict[str, Any], Any]:
    """All leaves by their path, arrays or descriptions of them, in the model's own shapes; and how to put them back."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(trees)
    flat = {}
    for path, leaf in paths:
        place = built.place_of(path)
        name = ("parameters", "optimizer")[path[0].idx] + jax.tree_util.keystr(path[1:])
        if _is_natural(place, leaf):
            flat[name] = leaf if isinstance(leaf, jax.Array) else _described(leaf, leaf.shape, leaf.sharding)
            continue
        # What is left without padding does not divide, and layers lie in the order of the stages: held whole for the moment.
        whole = NamedSharding(built.mesh, PartitionSpec())
        cut = _natural(leaf, place) if isinstance(leaf, jax.Array) else _described(leaf, place.logical_shape, whole)
        flat[name] = cut
    return flat, treedef


def _described(leaf: Any, shape: tuple[int, ...], sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _is_natural(place: Placement | None, leaf: Any) -> bool:
    """Whether an array is held as the model has it: no padding, and its layers in their order."""
    if place is None:
        return True
    return tuple(leaf.shape) == place.logical_shape and place.rows in (None, tuple(range(leaf.shape[0])))


@partial(jax.jit, static_argnums=1)
def _natural(leaf: jax.Array, place: Placement) -> jax.Array:
    return natural(jax.reshard(leaf, PartitionSpec()), place)


@partial(jax.jit, static_argnums=(1, 2))
def _arranged(leaf: jax.Array, place: Placement, like: Any) -> jax.Array:
    return jax.reshard(arranged(leaf, place, like), like.sharding.spec)


@contextlib.contextmanager
def _told(folder: Any) -> Iterator[None]:
    """A disk that is full or cannot be written as one sentence; anything else as it is."""
    try:
        yield
    except SpecError:
        raise
    except Exception as error:
        reason = _disk(error)
        if reason is None:
            raise
        raise SpecError(
            f"the checkpoint cannot be written in {str(folder)!r}: {reason}; those before it are whole: correct "
            "that, and go on with --resume."
        ) from error


def _disk(error: BaseException) -> str | None:
    """What the disk said, in whichever way Orbax and TensorStore pass it on."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EFBIG, errno.ENOTDIR, errno.EEXIST):
            return str(seen.strerror).lower()
        for sign in ("no space left", "read-only file system", "disk quota exceeded", "permission denied", "file too large"):
            if sign in str(seen).lower():
                return sign
        seen = seen.__cause__ or seen.__context__
    return None
