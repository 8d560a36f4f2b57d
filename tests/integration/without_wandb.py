"""``salve`` in a fork in which wandb has not been imported; its last line says what has been since."""

import runpy
import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
    del sys.modules[name]
try:
    runpy.run_module("salve.cli", run_name="__main__", alter_sys=True)
finally:
    print("LOADED", *sorted({"timm", "torch", "wandb"} & sys.modules.keys()))
