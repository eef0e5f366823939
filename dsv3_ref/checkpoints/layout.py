"""Names of the files of a checkpoint, whole or sharded."""

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STATE, TENSORS = "state.json", "training.safetensors"  # of a training run
SHARD_TABLE = "tensors.json"  # in a directory that several ranks wrote


def is_expert(name: str) -> bool:
    """Return whether a parameter is divided among the ranks of an expert group."""
    return ".experts." in name
