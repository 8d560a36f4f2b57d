"""``salve-edit``: apply a recipe to a file of weights, or undo it."""

import argparse
import os
import sys
from pathlib import Path

from salve.artifacts import save_tensors
from salve.backbones.weights import read_state_dict
from salve.editing.recipe import apply_recipe, load_recipe, undo_recipe
from salve.types import UserError


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="salve-edit",
        description="Apply a recipe to a plain torchvision or timm state_dict, or undo it. "
        "The result is a plain state_dict; undoing gives back the same bits.",
    )
    parser.add_argument("action", choices=("apply", "undo"))
    parser.add_argument("recipe", type=Path, help="the recipe's .json file; its .safetensors lies beside it")
    parser.add_argument("weights", type=Path, help="state_dict to start from (.safetensors, or a torch file)")
    parser.add_argument("out", type=Path, help="where to write the new state_dict (.safetensors)")
    given = parser.parse_args(arguments)
    try:
        if given.out.suffix != ".safetensors":
            raise UserError(f"{given.out} must end in .safetensors.")
        change = apply_recipe if given.action == "apply" else undo_recipe
        state = change(load_recipe(given.recipe), read_state_dict(given.weights))
    except UserError as error:
        print(f"salve-edit: {error}", file=sys.stderr)
        return 2
    unfinished = given.out.with_name(given.out.name + ".unfinished")
    save_tensors(unfinished, state)
    os.replace(unfinished, given.out)
    print(f"Wrote {given.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
