from experiments.beyond.robustness import EXPERIMENT
from experiments.experiment import main

raise SystemExit(main(EXPERIMENT))
