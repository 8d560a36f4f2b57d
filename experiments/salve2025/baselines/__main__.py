from experiments.experiment import main
from experiments.salve2025.baselines import EXPERIMENT

raise SystemExit(main(EXPERIMENT))
