"""What Hydra finds wrong in the settings, in one sentence that names the valid choices."""

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
    conf = conf_dir()  # whose files are the choices of a group
    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        files = sorted((conf / group).rglob("*.yaml"))
        choices = ", ".join(file.relative_to(conf / group).with_suffix("").as_posix() for file in files)
        return f"{group}={name} is no choice; {group} can be {choices}."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        node, key = cause.parent_node, str(cause.full_key)
        if OmegaConf.get_type(node) is dict:
            return f"{key} has no value to change; add it as +{key}=VALUE."
        settings = ", ".join(str(name) for name in node if name != "hydra" and not str(name).startswith("_"))
        return f"{key} is no setting; {key.rpartition('.')[0] or 'the top level'} has {settings}."
    lines = [str(part).splitlines()[0].rstrip(".:") for part in dict.fromkeys((error, cause)) if str(part)]
    return ": ".join(dict.fromkeys(lines)) + "."
