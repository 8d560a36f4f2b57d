"""``python -m experiments.salve2025.seeds``."""

import sys

from experiments.experiment import main
from experiments.salve2025.seeds import EXPERIMENT

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
