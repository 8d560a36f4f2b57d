"""SAEs whose step depends on the whole batch, over ranks that are processes."""

from typing import Any

import pytest
import torch
from torch import distributed

from salve.distributed import batch_share
from salve.sae import objective
from salve.sae.revival import update_rows_since_fired
from salve.sae.topk import learn_threshold
from tests.integration.commands import Rank
from tests.unit.sae_examples import drawn, example

#: Rows of a batch: shared evenly, unevenly, and so that the second rank has none.
BATCHES = (8, 7, 1)
VARIANTS = ("topk", "batch_topk", "matryoshka")


def step(variant: str, rows: int, rank: int, ranks: int) -> dict[str, Any]:
    """What a rank's training step comes to; gradients are its contribution to DDP's mean."""
    sae, batch = example(variant), drawn(rows, 6, seed=rows)[rank::ranks]
    dead = torch.tensor([latent in (1, 4, 8) for latent in range(9)])
    loss, latents = objective(sae, batch, 0.1, dead, auxk=2)
    share = batch_share(len(batch))
    gradients = torch.autograd.grad(loss * share, [sae.encoder, sae.decoder, sae.bias])
    threshold = learn_threshold(torch.tensor(5.0, dtype=torch.float64), latents, 3)
    rows_since_fired = update_rows_since_fired(torch.arange(9), latents, batch, 0.0)
    return {"gradients": gradients, "threshold": threshold, "rows_since_fired": rows_since_fired, "latents": latents}


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    done = {(variant, rows): step(variant, rows, rank, ranks) for variant in VARIANTS for rows in BATCHES}
    torch.save(done, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], dict[str, Any]]]:
    """Each rank's steps, by variant and number of rows."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [Rank(_rank, (rank, 2, str(folder))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_ranks_take_the_step_of_one_process(variant: str, parts: list[dict[tuple[str, int], dict[str, Any]]]) -> None:
    for rows in BATCHES:
        alone, pair = step(variant, rows, 0, 1), [part[variant, rows] for part in parts]
        for whole, *shares in zip(alone["gradients"], *(one["gradients"] for one in pair), strict=True):
            torch.testing.assert_close(sum(shares) / 2, whole)
        for rank, one in enumerate(pair):
            torch.testing.assert_close(one["threshold"], alone["threshold"])
            assert torch.equal(one["rows_since_fired"], alone["rows_since_fired"])
            torch.testing.assert_close(one["latents"], alone["latents"][rank::2])
