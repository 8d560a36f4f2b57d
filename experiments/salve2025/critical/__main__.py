from experiments.experiment import main
from experiments.salve2025.critical import EXPERIMENT

raise SystemExit(main(EXPERIMENT))
