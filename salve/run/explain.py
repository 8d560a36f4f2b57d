"""What Hydra finds wrong in the settings, in one sentence that names the valid choices."""

from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException


def conf_dir() -> Path:
    """The folder of configurations: inside an installed package, or at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def explain(error: HydraException | OmegaConfBaseException) -> str:
    """One sentence for an error that Hydra raised while it composed the settings."""
    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        if group == "hydra" and name.startswith("launcher/"):
            launcher = name.partition("/")[2]
            extra = launcher.split("_")[0].replace("submitit", "slurm")
            return f"Hydra's launcher {launcher} is not installed: pip install 'salve[{extra}]'."
        return _no_choice(group, name)
    if str(error).startswith("Ambiguous value"):
        argument = str(error).splitlines()[0].partition("'")[2].rstrip("'")
        key, _, values = argument.partition("=")
        return f"{argument} names several values: to sweep over them, use salve -m; to give a list, {key}=[{values}]."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        node, key = cause.parent_node, str(cause.full_key)
        if OmegaConf.get_type(node) is dict:
            return f"{key} has no value to change; add it as +{key}=VALUE."
        settings = ", ".join(str(name) for name in node if name != "hydra" and not str(name).startswith("_"))
        return f"{key} is no setting; {key.rpartition('.')[0] or 'the top level'} has {settings}."
    lines = [str(part).splitlines()[0].rstrip(".:") for part in dict.fromkeys((error, cause)) if str(part)]
    return ": ".join(dict.fromkeys(lines)) + "."


def group_mistake(arguments: Sequence[str]) -> str | None:
    """One sentence for a group that is given a number, at which Hydra raises no error of its own."""
    for argument in arguments:
        group, _, name = argument.partition("=")
        if name and (conf_dir() / group).is_dir() and not name[0].isalpha():
            return _no_choice(group, name)
    return None


def _no_choice(group: str, name: str) -> str:
    folder = conf_dir() / group
    choices = ", ".join(file.relative_to(folder).with_suffix("").as_posix() for file in sorted(folder.rglob("*.yaml")))
    return f"{group}={name} is no choice; {group} can be {choices}."
