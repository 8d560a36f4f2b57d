"""Processes for tests that need several: forks of one that has imported what takes seconds."""

import multiprocessing
from multiprocessing.context import ForkServerContext

HEAVY = ["torch", "pandas", "pytorch_lightning", "salve.artifacts", "salve.sae", "tests.unit.sae_examples"]


def forks() -> ForkServerContext:
    """A context of ``multiprocessing``; the first process that it starts takes the time of the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context
