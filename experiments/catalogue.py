"""All experiments of the paper, in the order of its story."""

from experiments.experiment import Experiment
from experiments.salve2025 import seeds, sparsity, suppression

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (suppression, seeds, sparsity)
}
