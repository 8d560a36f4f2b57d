"""All experiments of the paper, in the order of its story."""

from experiments.beyond import composition, layers, localisation, rivals, robustness
from experiments.experiment import Experiment
from experiments.salve2025 import atlas, baselines, cifar100, critical, cross_class, seeds, sparsity, suppression

_MODULES = (
    atlas,
    suppression,
    cross_class,
    critical,
    seeds,
    sparsity,
    baselines,
    cifar100,
    layers,
    rivals,
    composition,
    robustness,
    localisation,
)

EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in _MODULES}
