from experiments.beyond.localisation import EXPERIMENT
from experiments.experiment import main

raise SystemExit(main(EXPERIMENT))
