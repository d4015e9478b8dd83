"""Names in policies of jax.checkpoint that stand for nothing."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.hlo.warn.walk import Walk
from jaxllm.report.inspection import Finding


def find_unmatched_name(walk: Walk) -> Iterator[Finding]:
    """A name in a remat or offload policy that no checkpoint_name of the traced function gives. What it should have
    saved or offloaded is computed again. (On every compiler; not of a file, which has no policies.)"""
    for name, source in walk.view.unmatched:
        yield Finding(
            "unmatched-name",
            f"The policy of jax.checkpoint names {name!r}, and no jax.ad_checkpoint.checkpoint_name in the program "
            "does: nothing is saved or offloaded for it.",
            f"x = jax.ad_checkpoint.checkpoint_name(x, {name!r}) where the array is made, inside of what "
            "jax.checkpoint wraps; or correct the name in the policy.",
            source,
        )
