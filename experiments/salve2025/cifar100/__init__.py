"""A hundred classes: how much they share latents, and who falls when one class's latent is suppressed."""

from experiments.experiment import Experiment
from experiments.salve2025.cifar100.findings import analyse

EXPERIMENT = Experiment(
    "cifar100",
    "A hundred classes: what they share",
    ("cifar100",),
    analyse,
    quick=("sae.seed=0,1", "sae.epochs=20", "edit.alpha=[0,1,2,3,4,6,8,11,15,20,30,50]"),
    beside=("resnet18",),
)
