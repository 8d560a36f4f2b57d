from experiments.experiment import main
from experiments.salve2025.seeds import EXPERIMENT

raise SystemExit(main(EXPERIMENT))
