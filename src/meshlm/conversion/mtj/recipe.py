"""What becomes of the original's JSON config: a run's configuration, and what will differ.

Source: mesh-transformer-jax, device_train.py, train.py, tfrecord_loader.py, layers.py, sampling.py.
"""

from typing import Any

from meshlm.conversion.mtj.config import OldConfig
from meshlm.core.config import to_dict
from meshlm.core.errors import BadInputError

RECIPE = "mtj-2021"
_Z_LOSS = 1e-4
_NEEDED = (
    "cores_per_replica",
    "per_replica_batch",
    "total_steps",
    "lr",
    "end_lr",
    "warmup_steps",
    "anneal_steps",
    "weight_decay",
)


def to_run_config(config: OldConfig) -> dict[str, Any]:
    """Returns the model and the options of `meshlm train`, by their names in `TrainConfig`.

    Raises:
        BadInputError: the config has no training in it, or devices that replicas cannot share.
    """
    settings, where = config.settings, config.path
    for key in _NEEDED:
        if key not in settings:
            raise BadInputError(f"{where} has no {key!r}: a run cannot be made from it")
    shards = settings["cores_per_replica"]
    devices = settings.get("tpu_size", shards)
    if devices % shards:
        raise BadInputError(f"{where}: tpu_size {devices} cannot be shared by replicas of {shards}")
    if config.model.num_heads % shards or config.model.vocab_size % shards:
        raise BadInputError(
            f"{where}: {config.model.num_heads} heads and {config.model.vocab_size} rows of "
            f"vocabulary cannot be cut into cores_per_replica {shards}"
        )
    replicas = devices // shards
    accumulate = settings.get("gradient_accumulation_steps", 1)
    result = {
        "model": to_dict(config.model),
        "recipe": RECIPE,
        "recipe_shards": shards,
        "steps": settings["total_steps"],
        "batch_size": replicas * settings["per_replica_batch"] * accumulate,
        "seq_len": settings["seq"],
        "accumulate": accumulate,
        "learning_rate": settings["lr"],
        "end_learning_rate": settings["end_lr"],
        "warmup_steps": settings["warmup_steps"],
        "anneal_steps": settings["anneal_steps"],
        "weight_decay": settings["weight_decay"],
        "z_loss": _Z_LOSS,
        "mesh": {"data": replicas, "model": shards},
    }
    names = {"ckpt_every": "checkpoint_every", "val_every": "eval_every"}
    for old, new in (*names.items(), ("keep_every", "keep_every")):
        if old in settings:
            result[new] = settings[old]
    if "val_batches" in settings:
        sequences = settings["val_batches"] * replicas * settings["per_replica_batch"]
        result["eval_tokens"] = sequences * settings["seq"]
    return result


def differences(config: OldConfig) -> list[str]:
    """Returns a line for each thing that a run of this config does otherwise than the original."""
    settings = config.settings
    return [
        *_schedule(settings),
        *(line for key, line in _BY_KEY.items() if key in settings),
        *_ALWAYS,
    ]


def _schedule(settings: dict[str, Any]) -> list[str]:
    total, anneal = settings["total_steps"], settings["anneal_steps"]
    end = settings["warmup_steps"] + anneal
    lines = [
        f"total_steps: is when the run ends ({total}), not the length of the anneal; that is "
        f"anneal_steps ({anneal}), counted after the warm-up. The rate is {settings['end_lr']:g} "
        f"from step {end} on. It is so in the original too, whose schedule calls the anneal "
        "total_steps."
    ]
    if total < end:
        lines.append(
            f"total_steps: the run ends at step {total}, before the anneal does at {end}; the last "
            "rate is above end_lr, as it is in the original."
        )
    if "tpu_size" not in settings:
        lines.append(
            "tpu_size: is not in the config, and the original took the devices it found; one "
            "replica is assumed. More replicas make the batch larger."
        )
    return lines


_BY_KEY = {
    "ckpt_every": (
        "ckpt_every: the original saves one step after each multiple, and never with 1; MeshLM "
        "saves at each multiple and at the end."
    ),
    "val_every": (
        "val_every: the original measures one step after each multiple, and never with 1; MeshLM "
        "measures at each multiple."
    ),
    "keep_every": (
        "keep_every: device_train.py ignores it, and train.py decides by it about the checkpoint "
        "three saves old; MeshLM keeps the checkpoints at its multiples for good."
    ),
    "val_batches": (
        "val_batches: is now eval_tokens, the same number of tokens, spread over the held-out "
        "split; the original takes the first ones of each file."
    ),
    "train_set": (
        "train_set: lists record files and is not taken over: make a token store with `meshlm data "
        "prepare` and give it by --data. The original loses the tail of every record file; a store "
        "loses none."
    ),
    "val_set": "val_set: is not taken over; the token stores of --data have a held-out split.",
    "eval_harness_tasks": "eval_harness_tasks: no tasks are run while training.",
    "bucket": "bucket: checkpoints are written to the folder given by --run, not to a bucket.",
    "model_dir": "model_dir: is not taken over; give --run.",
    "name": "name: is not taken over; a run has the name of its folder.",
    "wandb_project": "wandb_project: nothing is sent anywhere; metrics are in the run's folder.",
    "early_cast": (
        "early_cast: the original casts where the key is there at all, even as false; MeshLM goes "
        "by the recipe alone."
    ),
    "optimizer": "optimizer: is not taken over; the recipe has the original's Adam.",
    "sampler": "sampler: is not taken over; give --sample-prompts, or use `meshlm generate`.",
    "d_head": "d_head: the original does not read it; a head's width is d_model / n_heads.",
}
_ALWAYS = (
    "first step: the original compiles with a step that it does not log; every step of MeshLM's is "
    "logged.",
    "failed saves: the original tries three times, whatever the reason; MeshLM says the reason, "
    "trains on and saves again when the next one is due, and the last whole checkpoint stays.",
    "noise scale: both estimate it from the gradients of the parts and of the whole batch; it is "
    "grad_noise_scale in metrics.jsonl.",
    "data order: a batch follows from --seed and the step, and is the same after a restart; the "
    "original goes through its files in their order.",
    "seed: initial weights are drawn from the same distribution by another generator, and do not "
    "depend on the number of shards.",
    "z-loss: 1e-4 times the square of log-sum-exp above the largest logit, as the original has it "
    "without a setting; it is in the training loss alone.",
    "summed biases: the original has them once per shard, which multiplies their learning rate and "
    "counts them so often in the gradient's norm; the recipe keeps both with recipe_shards.",
    "bfloat16: the recipe rounds weights and gradients as the original does; sums within a product "
    "may be in another order, so losses agree closely and not bit for bit.",
    "token ids: the original gives an id outside of the vocabulary a vector of zeros; MeshLM "
    "refuses it.",
    "samples: the original's top-k never removes token 0; MeshLM's does. With the profile mtj-2021 "
    "top-k and top-p come before temperature as in the original, otherwise after it.",
)
