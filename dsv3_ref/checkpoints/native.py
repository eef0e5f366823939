"""Checkpoint directories: load ours and Hugging Face's, write ours.

Ours have `config.json` with the fields of `Config`, and `model.safetensors` with our names. Those
written by several ranks have one safetensors file per rank and a table of their tensors.
"""

import re
import warnings
from collections.abc import Callable, Container
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError

from dsv3_ref.checkpoints.atomic import OLD, atomic_dir, read_json, temp_sibling
from dsv3_ref.checkpoints.hf_config import config_from_hf, promised_mtp_layers
from dsv3_ref.checkpoints.huggingface import IGNORED, LAYER, hf_names, is_gate_bias
from dsv3_ref.checkpoints.hub import local_dir
from dsv3_ref.checkpoints.layout import CONFIG, SHARD_TABLE, TENSORS, is_expert
from dsv3_ref.checkpoints.manifest import (
    Loaded,
    first_whole,
    require_manifest,
    verified,
    write_manifest,
)
from dsv3_ref.checkpoints.safetensors_files import (
    FP8,
    SCALE_SUFFIX,
    SHARD_BYTES,
    TensorFiles,
    write_safetensors,
)
from dsv3_ref.checkpoints.sharded import build_on_meta, consolidate, global_tensors
from dsv3_ref.checkpoints.storage import read_into
from dsv3_ref.config import Config, UserError, from_dict
from dsv3_ref.model import Transformer

AnyPath = str | PathLike[str]
TakePart = Callable[[str, torch.Tensor], torch.Tensor]
STEP_NAME = re.compile(r"step_\d{7}|step_[1-9]\d{7,}", re.ASCII)

# ── Loading ──


def load(
    directory: AnyPath,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Transformer:
    """Return the model of a directory, ours or Hugging Face's, or of the hub (`owner/name`).

    Without `dtype`, tensors keep their stored dtype, and FP8 tensors get that of the embedding.
    Gate biases stay fp32. With `verify`, files are compared with the manifest if there is one, and
    the newest undamaged checkpoint of a run is loaded. Raise a `UserError` if the directory is
    invalid.
    """
    return newest_whole(directory, partial(load_dir, device=device, dtype=dtype), verify)


def load_dir(
    folder: Path, device: torch.device | str | None, dtype: torch.dtype | None
) -> Transformer:
    """Return the model of one checkpoint."""
    if is_sharded(folder):
        return consolidate(folder).to(device, dtype)
    reader = CheckpointReader(folder)
    state = {name: reader.read(name, device, dtype) for name in reader.expected}
    reader.model.load_state_dict(state, assign=True)
    return reader.model


def newest_whole(directory: AnyPath, read: Callable[[Path], Loaded], verify: bool = True) -> Loaded:
    """Return `read(folder)` for the newest undamaged checkpoint of a run, or for the directory.

    Warn of each damaged checkpoint; raise a `DamageError` if the oldest one is damaged, too.
    """
    checkpoints = list_checkpoints(directory)

    def read_verified(folder: Path) -> Loaded:
        if verify and checkpoints:
            require_manifest(folder)
        with verified(folder, verify):
            return read(folder)

    newest_first = reversed(checkpoints or [resolve_checkpoint_dir(directory)])
    loaded, damages = first_whole(newest_first, read_verified)
    for damage in damages.values():
        warnings.warn(f"{damage}. An earlier checkpoint is loaded instead.", stacklevel=3)
    return loaded


def load_checkpoint_config(directory: AnyPath) -> Config:
    """Return the config of a directory, ours or Hugging Face's, whole or sharded."""
    folder = resolve_checkpoint_dir(directory)
    if is_sharded(folder):
        return from_dict(read_json(folder / CONFIG))
    return CheckpointReader(folder).config


def open_tensors(directory: AnyPath) -> Callable[[str], torch.Tensor]:
    """Return a function that reads a tensor by our name of it."""
    folder = resolve_checkpoint_dir(directory)
    if is_sharded(folder):
        return consolidate(folder).state_dict().__getitem__
    return CheckpointReader(folder).read


def whole_tensor(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, which is the part of a model on one rank."""
    return x


@torch.no_grad()
def load_into(
    model: Transformer, directory: AnyPath, part: TakePart = whole_tensor, verify: bool = True
) -> None:
    """Copy the weights of a directory into a model of any dtype.

    `part(name, tensor)` returns the part of each tensor that this model holds.
    """
    newest_whole(directory, partial(copy_weights, model, part), verify)


def copy_weights(model: Transformer, part: TakePart, directory: Path) -> None:
    """Copy the weights of one checkpoint into a model."""
    read = open_tensors(directory)
    for name, x in model.state_dict().items():
        try:
            x.copy_(part(name, read(name)))
        except (KeyError, RuntimeError):
            raise UserError(f"{directory} does not fit this model: {name}") from None


def fill_tensors(folder: Path, targets: dict[str, torch.Tensor]) -> None:
    """Fill tensors from the checkpoint of a run, whole or sharded, by their global names.

    targets: `model.<name>`, `exp_avg.<name>`, `ema.<name>` and so on; the experts of a layer are
    one stacked tensor, or one of them is `<name>.<i>`. Raise a `UserError` if one is missing or has
    another shape: an incomplete optimizer state is not resumed.
    """
    if is_sharded(folder):
        single: dict[str, torch.Tensor] = {}
        for key, x in targets.items():
            is_stack = is_expert(key) and not key.rpartition(".")[2].isdigit()
            single |= global_tensors("", key, x, 0) if is_stack else {key: x}
        read_into(folder, single)
        return
    weights, training = TensorFiles(folder), TensorFiles(folder, (TENSORS,))
    for key, target in targets.items():
        in_weights = key.startswith("model.")
        stored, name = (weights, key.removeprefix("model.")) if in_weights else (training, key)
        whole, _, index = name.rpartition(".")
        try:
            if is_expert(name) and index.isdigit():
                target.copy_(stored.files[whole].get_slice(whole)[int(index)])
            else:
                target.copy_(stored.files[name].get_tensor(name))
        except (LookupError, RuntimeError, SafetensorError) as e:
            raise UserError(f"{folder} lacks {key}, or it has another shape ({e})") from None


def read_other_tensors(folder: Path, targets: Container[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's state that `fill_tensors` has not read into `targets`."""
    training = TensorFiles(folder, (TENSORS,))
    return {name: training.read(name) for name in training.files if name not in targets}


class CheckpointReader:
    """A directory whose tensors match its config; they are read on demand."""

    def __init__(self, directory: Path):
        self.directory = directory
        values = read_json(directory / CONFIG)
        self.is_hf = "model_type" in values
        self.stored = TensorFiles(directory)
        try:
            if self.is_hf:
                promised = config_from_hf(values)
                n_mtp_layers = self.count_mtp_layers(promised_mtp_layers(values), promised)
                self.config = replace(promised, n_mtp_layers=n_mtp_layers)
            else:
                self.config = from_dict(values)
        except (UserError, TypeError) as e:
            raise UserError(f"{directory / CONFIG}: {e}") from None
        n_stored = len(self.stored.files)
        self.model = build_on_meta(self.config, n_stored, directory)
        self.expected = self.model.state_dict()
        n_experts = max((len(x) for x in self.expected.values() if x.ndim == 3), default=0)
        if self.is_hf and n_experts > n_stored:
            raise UserError(
                f"{directory / CONFIG} asks for {n_experts:,} experts per layer, but {n_stored:,} "
                "tensors are stored: copy the directory again"
            )
        self.check_tensors()

    def count_mtp_layers(self, promised: int | None, config: Config) -> int:
        """Return the promised MTP layers, all that are stored without a promise, or 0 if none is.

        transformers keeps the promise in its config.json and drops the layers.
        """
        layers = {int(m[1]) for m in map(LAYER.match, self.stored.files) if m}
        n_stored = sum(i >= config.n_layers for i in layers)
        if promised and not n_stored:
            warnings.warn(f"{self.directory} has no MTP layer: loaded without", stacklevel=4)
        return n_stored if promised is None else promised * bool(n_stored)

    def stored_names(self, name: str) -> list[str]:
        """Return the stored names of our tensor: itself, or Hugging Face's, one per expert."""
        return hf_names(name, self.config) if self.is_hf else [name]

    def expert_slices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the slice of our tensor for each of its stored names: all of it, or an expert."""
        return list(tensor.unbind()) if self.is_hf and tensor.ndim == 3 else [tensor]

    def check_tensors(self) -> None:
        """Raise a `UserError` unless exactly the expected tensors are stored, in their shapes."""
        slices: dict[str, torch.Tensor] = {}
        for name, x in self.expected.items():
            slices |= zip(self.stored_names(name), self.expert_slices(x))
        files = self.stored.files
        if missing := [name for name in slices if name not in files]:
            raise UserError(f"{self.directory} lacks {abbreviate(missing)}")
        scales = {name + SCALE_SUFFIX for name in slices if self.stored.dtype(name) == FP8}
        if missing := sorted(scales - set(files)):
            raise UserError(f"{self.directory} has FP8 weights but lacks {abbreviate(missing)}")
        stems = {name: name.removesuffix(SCALE_SUFFIX) for name in files}
        unknown = [n for n, stem in stems.items() if n not in slices and stem not in slices]
        if unknown := [n for n in unknown if not (self.is_hf and IGNORED.fullmatch(stems[n]))]:
            raise UserError(
                f"{self.directory} has tensors that {CONFIG} does not call for: "
                f"{abbreviate(unknown)}"
            )
        for name, x in slices.items():
            self.check_shape(name, tuple(x.shape))

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raise a `UserError` if the shape of a stored tensor is not that of the config."""
        shape = self.stored.shape(name)
        if shape == expected:
            return
        vocabulary = self.stored_names("embed.weight") + self.stored_names("head.weight")
        if name in vocabulary and shape[1:] == expected[1:]:
            raise UserError(
                f"{self.directory}: {name} has {shape[0]} rows, but vocab_size in {CONFIG} is "
                f"{expected[0]}: weights and vocabulary do not belong together"
            )
        raise UserError(
            f"{self.directory}: {name} has shape {shape}, but {CONFIG} asks for {expected}"
        )

    def target_dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype; for an FP8 weight the embedding's, for a gate bias fp32."""
        dtype = self.stored.dtype(self.stored_names(name)[0])
        if dtype == FP8:
            dtype = self.stored.dtype(self.stored_names("embed.weight")[0])
        return torch.float32 if is_gate_bias(name) else dtype

    def read(
        self,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Read one of our tensors into new memory, with its experts stacked."""
        dtype = self.target_dtype(name) if dtype is None or is_gate_bias(name) else dtype
        tensor = torch.empty(self.expected[name].shape, dtype=dtype, device=device)
        for row, stored in zip(self.expert_slices(tensor), self.stored_names(name), strict=True):
            row.copy_(self.stored.read(stored))
        return tensor


def abbreviate(names: list[str]) -> str:
    """Return `a, b, c and 4 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ── Saving ──


def save(model: Transformer, directory: AnyPath, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model in our own format, atomically."""
    with atomic_dir(directory) as tmp:
        write_safetensors(tmp, asdict(model.config), model.state_dict(), shard_bytes)
        write_manifest(tmp)


# ── Directories ──


def is_sharded(folder: Path) -> bool:
    """Return whether several ranks wrote this checkpoint."""
    return (folder / SHARD_TABLE).is_file()


def list_checkpoints(run: AnyPath) -> list[Path]:
    """Return the checkpoints of a training run, oldest first, without other files there."""
    folders = (Path(run) / "checkpoints").glob("step_*")
    own = [p for p in folders if STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(own, key=step_number)


def step_number(folder: Path) -> int:
    """Return the step of a checkpoint: `step_0000012` → 12."""
    return int(folder.name.removeprefix("step_"))


def resolve_checkpoint_dir(directory: AnyPath) -> Path:
    """Return the directory to load: the newest checkpoint of a run, or the directory itself.

    A model of the Hugging Face Hub is downloaded (`owner/name`, `owner/name@revision`). If a
    process was killed while replacing the directory, return the one that it had set aside.
    """
    path = local_dir(directory)
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; a checkpoint is a directory")
    if path.name and (aside := temp_sibling(path, OLD)).is_dir():
        return aside
    raise UserError(f"there is no directory {path}: check the path")


def find_tokenizer_dir(path: Path) -> Path:
    """Return the folder with the tokenizer: the path itself, or the run of a checkpoint."""
    path = local_dir(path)
    places = [path, *path.resolve().parents[:2]]
    names = "tokenizer.json", "tiktoken.model", "tokenizer.model"
    return next((p for p in places if any((p / name).is_file() for name in names)), path)
