# SPDX-License-Identifier: MIT
"""Names that are no settings, although people have reason to type them: what to use instead."""

#: Old names of settings.
RENAMED = {
    "data.val_per_class": "data.select_per_class",
    "sae.learn_shift": "sae.learn_b_dec",
}

_LENGTH = "finetune.epochs, and sae.steps or sae.epochs, say how long a training is"
_FEWER = "salve measures every image; data.limit_per_class takes fewer"
_EVERY_EPOCH = "salve measures the select images after every epoch, to choose the best one"
_RANKS = "trainer.devices says how many ranks a node has, and torchrun or SLURM how many nodes there are"

#: Arguments of Lightning's Trainer that salve sets itself, or that would contradict what it promises.
OF_TRAINER = {
    "barebones": "salve needs the checkpoints and metrics that it would switch off",
    "callbacks": "write callbacks.NAME._target_=CLASS, at the top level",
    "check_val_every_n_epoch": _EVERY_EPOCH,
    "default_root_dir": "output_dir says where everything is written",
    "enable_autolog_hparams": "all settings of a run are in its config.yaml, and in W&B with logger=wandb",
    "enable_checkpointing": "salve keeps the best and the last epoch itself, and resumes from them",
    "enable_progress_bar": "salve shows a bar on a terminal, and lines in a log",
    "fast_dev_run": (
        "every run tries all its steps on a few images first; for a short run, lower data.limit_per_class (or "
        "data.train_per_class), finetune.epochs and sae.steps"
    ),
    "limit_predict_batches": _FEWER,
    "limit_test_batches": _FEWER,
    "limit_val_batches": _FEWER,
    "logger": "choose logger=csv or logger=wandb",
    "max_epochs": _LENGTH,
    "max_steps": _LENGTH,
    "max_time": f"results must not depend on the speed of the machine; {_LENGTH}",
    "model_registry": "salve keeps models in <output_dir>/artifacts",
    "num_nodes": _RANKS,
    "num_sanity_val_steps": "every run tries all its steps on a few images first",
    "overfit_batches": "it would replace the order of the images; data.limit_per_class takes fewer images",
    "plugins": "choose trainer.precision and trainer.strategy; salve makes the plugins that they need",
    "reload_dataloaders_every_n_epochs": "salve's loaders stay the same in every epoch",
    "sync_batchnorm": "salve shares BatchNorm among the ranks on GPUs itself",
    "use_distributed_sampler": "salve divides the batches among the ranks itself, without repeating images",
    "val_check_interval": _EVERY_EPOCH,
}


def instead_of(key: str) -> str | None:
    """One sentence on what to use instead of a setting, where that is known."""
    if key in RENAMED:
        return f"{key} is no setting; its name is {RENAMED[key]}."
    group, _, name = key.partition(".")
    if group == "trainer" and name in OF_TRAINER:
        return f"trainer.{name} cannot be set: {OF_TRAINER[name]}."
    return None
