from experiments.experiment import main
from experiments.salve2025.cifar100 import EXPERIMENT

raise SystemExit(main(EXPERIMENT))
