from experiments.experiment import main
from experiments.salve2025.cross_class import EXPERIMENT

raise SystemExit(main(EXPERIMENT))
