from experiments.beyond.composition import EXPERIMENT
from experiments.experiment import main

raise SystemExit(main(EXPERIMENT))
