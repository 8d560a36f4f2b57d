from experiments.beyond.sae_variants import EXPERIMENT
from experiments.experiment import main

raise SystemExit(main(EXPERIMENT))
