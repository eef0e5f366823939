"""Checkpoints: our own directories and Hugging Face's, read and written as safetensors.

Ours: `config.json` with the fields of `Config`, `model.safetensors` with our names. Theirs: a
`deepseek_v3` or `deepseek_v2` config, their names, every expert by itself, and MTP layers numbered
after the last layer. Both may be cut into shards behind an index.
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv3_ref.checkpoints.atomic import OLD, atomic_dir, read_json, temp_sibling
from dsv3_ref.config import Config, UserError, from_dict
from dsv3_ref.fp8 import weight_dequant
from dsv3_ref.model import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DCP_METADATA = ".metadata"  # in what several ranks wrote
SHARD_BYTES = 5_000_000_000  # bytes of a file before another one starts
SCALE_SUFFIX = "_scale_inv"  # what an FP8 weight's scales are called, after its own name

# ── Names: ours, Hugging Face's; L a layer (MTP layers come after the last), E each expert ──

HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "L.attn_norm.weight": "model.layers.L.input_layernorm.weight",
    "L.attn.wq.weight": "model.layers.L.self_attn.q_proj.weight",
    "L.attn.wq_a.weight": "model.layers.L.self_attn.q_a_proj.weight",
    "L.attn.q_norm.weight": "model.layers.L.self_attn.q_a_layernorm.weight",
    "L.attn.wq_b.weight": "model.layers.L.self_attn.q_b_proj.weight",
    "L.attn.wkv_a.weight": "model.layers.L.self_attn.kv_a_proj_with_mqa.weight",
    "L.attn.kv_norm.weight": "model.layers.L.self_attn.kv_a_layernorm.weight",
    "L.attn.wkv_b.weight": "model.layers.L.self_attn.kv_b_proj.weight",
    "L.attn.wo.weight": "model.layers.L.self_attn.o_proj.weight",
    "L.ffn_norm.weight": "model.layers.L.post_attention_layernorm.weight",
    "L.ffn.w1.weight": "model.layers.L.mlp.gate_proj.weight",
    "L.ffn.w2.weight": "model.layers.L.mlp.down_proj.weight",
    "L.ffn.w3.weight": "model.layers.L.mlp.up_proj.weight",
    "L.ffn.gate.weight": "model.layers.L.mlp.gate.weight",
    "L.ffn.gate.bias": "model.layers.L.mlp.gate.e_score_correction_bias",
    "L.ffn.experts.w1": "model.layers.L.mlp.experts.E.gate_proj.weight",
    "L.ffn.experts.w2": "model.layers.L.mlp.experts.E.down_proj.weight",
    "L.ffn.experts.w3": "model.layers.L.mlp.experts.E.up_proj.weight",
    "L.ffn.shared_experts.w1.weight": "model.layers.L.mlp.shared_experts.gate_proj.weight",
    "L.ffn.shared_experts.w2.weight": "model.layers.L.mlp.shared_experts.down_proj.weight",
    "L.ffn.shared_experts.w3.weight": "model.layers.L.mlp.shared_experts.up_proj.weight",
    "L.enorm.weight": "model.layers.L.enorm.weight",
    "L.hnorm.weight": "model.layers.L.hnorm.weight",
    "L.eh_proj.weight": "model.layers.L.eh_proj.weight",
    "L.norm.weight": "model.layers.L.shared_head.norm.weight",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.")
IGNORED = re.compile(  # copies of the embedding and head in MTP layers; tables anyone can compute
    r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight|.*rotary_emb\.inv_freq"
)


def hf_names(name: str, config: Config) -> list[str]:
    """Where Hugging Face keeps our tensor `name`: one place, or one for each expert."""
    if not (place := re.match(r"(layers|mtp)\.(\d+)\.(block\.)?", name)):
        return [HF_NAMES[name]]
    layer = int(place[2]) + (config.n_layers if place[1] == "mtp" else 0)
    path = HF_NAMES["L." + name[place.end() :]].replace(".L.", f".{layer}.")
    experts = range(config.n_routed_experts) if ".E." in path else [0]
    return [path.replace(".E.", f".{e}.") for e in experts]


def is_bias(name: str) -> bool:
    """True for gate biases, kept in fp32: steps of 0.001 vanish in bf16."""
    return name.endswith("gate.bias")


# ── Config: ours, Hugging Face's ──

HF_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "embed_std": "embedding_initializer_range",  # ours; others ignore it
}
HF_YARN_FIELDS = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale_all_dim",
}
HF_DEFAULTS = {
    "q_lora_rank": 0,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.02,
    "embedding_initializer_range": 0.006,
    "rms_norm_eps": 1e-6,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 0.0,
}
SUPPORTED = {  # values that this model implements, the first also when a config is silent
    "rope_interleave": (True,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "rms_norm_eps": (1e-6,),  # the latents' norms have this one, whatever the config says
}
SUPPORTED_GATES = {
    "deepseek_v3": {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
    },
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
}
SUPPORTED_ROPE = {"truncate": (True,), "partial_rotary_factor": (1.0,)}
SUPPORTED_FP8 = {"quant_method": ("fp8",), "weight_block_size": ([128, 128],)}


def require_supported(values: dict, allowed: dict) -> None:
    """Raise for the first field with a value that this model does not implement."""
    for field, choices in allowed.items():
        value = values.get(field)
        if value is not None and value not in choices:
            raise UserError(f"{field} is {value!r}; supported: {' or '.join(map(repr, choices))}")


def map_fields(values: dict, fields: dict[str, str]) -> dict:
    """Our fields from theirs; null and absent ones from WHEN_NULL, else an error."""
    out = {}
    for ours, theirs in fields.items():
        value = values.get(theirs)
        if value is None and theirs not in HF_DEFAULTS:
            raise UserError(f"the field {theirs} is missing")
        if not isinstance(value, int | float | None):
            raise UserError(f"{theirs} must be a number, not {value!r}")
        out[ours] = HF_DEFAULTS[theirs] if value is None else value
    return out


def config_from_hf(values: dict, n_mtp_layers: int) -> Config:
    """Our Config from a Hugging Face config.json."""
    kind = values["model_type"]
    if kind not in SUPPORTED_GATES:
        raise UserError(f"a model of type {kind!r}; supported: {' or '.join(SUPPORTED_GATES)}")
    require_supported(values, SUPPORTED | SUPPORTED_GATES[kind])
    require_supported(values, {"num_key_value_heads": (values.get("num_attention_heads"),)})
    require_supported(values.get("quantization_config") or {}, SUPPORTED_FP8)
    ours = map_fields(values, HF_FIELDS)
    if kind == "deepseek_v2" and values.get("topk_method") != "group_limited_greedy":
        ours |= {"n_expert_groups": 1, "n_limited_groups": 1}
    score_func = SUPPORTED_GATES[kind]["scoring_func"][0]
    return from_dict(
        ours | rope_fields(values) | {"score_func": score_func, "n_mtp_layers": n_mtp_layers}
    )


def rope_fields(values: dict) -> dict:
    """Our RoPE and YaRN fields from `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    r = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = r.get("rope_theta") or values.get("rope_theta") or Config.rope_theta
    kind = r.get("rope_type") or r.get("type") or "default"
    require_supported({"rope_type": kind}, {"rope_type": ("default", "yarn")})
    require_supported(r, SUPPORTED_ROPE)
    if kind == "default":
        length = values.get("max_position_embeddings")
        return {"rope_theta": theta, "rope_factor": 1.0, "original_seq_len": length}
    ours = map_fields(r, HF_YARN_FIELDS)
    if ours["rope_factor"] > 1 and not is_unscaled_rotation(r):
        raise UserError(
            f"mscale ({r.get('mscale')}) and mscale_all_dim ({r.get('mscale_all_dim')}) of YaRN "
            "must be equal and not 0: otherwise cosine and sine are scaled, which is not supported"
        )
    return {"rope_theta": theta} | ours


def is_unscaled_rotation(r: dict) -> bool:
    """True when YaRN leaves cosine and sine unscaled (attention factor 1)."""
    if r.get("attention_factor") is not None:
        return r["attention_factor"] == 1
    return bool(r.get("mscale")) and r["mscale"] == r.get("mscale_all_dim")


def config_to_hf(config: Config, dtype: torch.dtype) -> dict:
    """A Hugging Face config.json, in the spelling of the released one."""
    sigmoid = config.score_func == "sigmoid"
    kind, name = ("deepseek_v3", "DeepseekV3") if sigmoid else ("deepseek_v2", "DeepseekV2")
    gate = {field: choices[0] for field, choices in SUPPORTED_GATES[kind].items()}
    if not sigmoid and config.n_expert_groups > 1:
        gate["topk_method"] = "group_limited_greedy"
    if sigmoid and config.n_expert_groups == config.n_routed_experts:
        raise UserError("transformers needs two experts in each group: choose fewer groups")
    values = {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    require_supported(values, SUPPORTED)
    yarn = {theirs: getattr(config, ours) for ours, theirs in HF_YARN_FIELDS.items()}
    return {field: choices[0] for field, choices in SUPPORTED.items()} | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        **values,
        **gate,
        "q_lora_rank": config.q_lora_rank or None,
        "num_key_value_heads": config.n_heads,
        "num_nextn_predict_layers": config.n_mtp_layers,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": "yarn", "mscale": config.mscale, **yarn}
        if config.rope_factor > 1
        else None,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# ── Reading ──

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


def load(directory, device=None, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a directory, ours or Hugging Face's; `dtype` None: as stored, FP8 expanded.

    Gate biases stay fp32. Raises `UserError` for everything that is wrong with the directory.
    """
    if (sharded := resolve_checkpoint_dir(directory) / DCP_METADATA).is_file():
        from dsv3_ref.checkpoints.sharded import consolidate  # which imports this module

        return consolidate(sharded.parent).to(device, dtype)
    source = CheckpointReader(directory)
    state = {name: source.read(name, device, dtype) for name in source.expected}
    source.model.load_state_dict(state, assign=True)
    return source.model


def load_checkpoint_config(directory) -> Config:
    """The config of a directory, ours or Hugging Face's, whole or sharded."""
    if (sharded := resolve_checkpoint_dir(directory) / DCP_METADATA).is_file():
        return from_dict(read_json(sharded.parent / CONFIG))
    return CheckpointReader(directory).config


def open_tensors(directory) -> Callable[[str], torch.Tensor]:
    """Our name of a tensor → the tensor, read when asked for."""
    if (resolve_checkpoint_dir(directory) / DCP_METADATA).is_file():
        return load(directory).state_dict().__getitem__
    return CheckpointReader(directory).read


@torch.no_grad()
def load_into(model: Transformer, directory, part=lambda name, x: x) -> None:
    """Weights of a directory into a model of any dtype; `part` takes from each what is held."""
    read = open_tensors(directory)
    for name, x in model.state_dict().items():
        try:
            x.copy_(part(name, read(name)))
        except (KeyError, RuntimeError):
            raise UserError(f"{directory} does not fit this model: {name}") from None


class CheckpointReader:
    """A directory opened and checked against its config; tensors are read when asked for."""

    def __init__(self, directory):
        self.directory = resolve_checkpoint_dir(directory)
        values = read_json(self.directory / CONFIG)
        self.hf = "model_type" in values
        self.files = open_files(self.directory)
        try:
            n_mtp = self.count_mtp_layers(values) if self.hf else 0
            self.config = config_from_hf(values, n_mtp) if self.hf else from_dict(values)
        except (UserError, TypeError) as e:
            raise UserError(f"{self.directory / CONFIG}: {e}") from None
        with torch.device("meta"):
            self.model = Transformer(self.config)
        self.expected = self.model.state_dict()
        self.check_tensors()

    def count_mtp_layers(self, values: dict) -> int:
        """MTP layers as the config says, or 0 if none is stored: transformers drops them."""
        layers = {int(m[1]) for m in map(LAYER.match, self.files) if m}
        stored = sum(i >= values.get("num_hidden_layers", 0) for i in layers)
        said = values.get("num_nextn_predict_layers", values.get("num_mtp_layers", stored))
        if said and not stored:
            warnings.warn(f"{self.directory} holds no MTP layer: loaded without", stacklevel=4)
        return said if stored else 0

    def stored_names(self, name: str) -> list[str]:
        """Stored names of our tensor: itself, or Hugging Face's, one for each expert."""
        return hf_names(name, self.config) if self.hf else [name]

    def expert_slices(self, tensor) -> list[torch.Tensor]:
        """What each of the parts fills: the whole, or one expert."""
        return tensor.unbind() if self.hf and tensor.ndim == 3 else [tensor]

    def check_tensors(self) -> None:
        """Every tensor is there, in its shape, and no other."""
        want = {
            p: r
            for n, t in self.expected.items()
            for p, r in zip(self.stored_names(n), self.expert_slices(t))
        }
        if missing := [name for name in want if name not in self.files]:
            raise UserError(f"{self.directory} lacks {abbreviate(missing)}")
        scales = {p + SCALE_SUFFIX for p in want if self.stored_dtype(p) == torch.float8_e4m3fn}
        if missing := sorted(scales - set(self.files)):
            raise UserError(f"{self.directory} holds FP8 weights but lacks {abbreviate(missing)}")
        unknown = [
            n for n in self.files if n not in want and n.removesuffix(SCALE_SUFFIX) not in want
        ]
        if unknown := [n for n in unknown if not (self.hf and IGNORED.fullmatch(n))]:
            raise UserError(
                f"{self.directory} holds what {CONFIG} does not know: {abbreviate(unknown)}"
            )
        for name, row in want.items():
            self.check_shape(name, tuple(row.shape))

    def check_shape(self, part: str, want: tuple) -> None:
        """Raise if a stored tensor has not the shape that the config asks for."""
        shape = tuple(self.files[part].get_slice(part).get_shape())
        if shape == want:
            return
        where = f"{self.directory}: {part}"
        if (
            part in self.stored_names("embed.weight") + self.stored_names("head.weight")
            and shape[1:] == want[1:]
        ):
            raise UserError(
                f"{where} has {shape[0]} rows, but vocab_size in {CONFIG} is {want[0]}: "
                "weights and vocabulary do not belong together"
            )
        raise UserError(f"{where} has shape {shape}, but {CONFIG} asks for {want}")

    def stored_dtype(self, part: str) -> torch.dtype:
        """The dtype of a stored tensor, if it is one we read."""
        code = self.files[part].get_slice(part).get_dtype()
        if code not in DTYPES:
            raise UserError(f"{part} is stored as {code}; supported: {', '.join(DTYPES)}")
        return DTYPES[code]

    def target_dtype(self, name: str) -> torch.dtype:
        """As stored; an FP8 weight takes the embedding's, a gate bias fp32."""
        dtype = self.stored_dtype(self.stored_names(name)[0])
        if dtype == torch.float8_e4m3fn:
            dtype = self.stored_dtype(self.stored_names("embed.weight")[0])
        return torch.float32 if is_bias(name) else dtype

    def read(self, name: str, device=None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One of our tensors in fresh memory, its experts stacked."""
        dtype = self.target_dtype(name) if dtype is None or is_bias(name) else dtype
        out = torch.empty(self.expected[name].shape, dtype=dtype, device=device)
        for row, part in zip(self.expert_slices(out), self.stored_names(name), strict=True):
            row.copy_(self.read_stored(part))
        return out

    def read_stored(self, part: str) -> torch.Tensor:
        """One stored tensor, FP8 expanded to fp32 by its block scales."""
        try:
            tensor = self.files[part].get_tensor(part)
            if tensor.dtype != torch.float8_e4m3fn:
                return tensor
            return weight_dequant(
                tensor, self.files[part + SCALE_SUFFIX].get_tensor(part + SCALE_SUFFIX)
            )
        except (ValueError, SafetensorError) as e:
            raise UserError(f"{self.directory}: {part}: {e}") from None


def abbreviate(names: list[str]) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def open_files(directory: Path) -> dict[str, safe_open]:
    """Tensor name → the open file that holds it."""
    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        if not (directory / INDEX).is_file():
            raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}; only these are read")
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
    files = [open_file(directory / name) for name in names]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def open_file(path: Path) -> safe_open:
    """A safetensors file, mapped and not yet read."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is named in {INDEX} but is not there: copy it too") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or cut off ({e}): copy it again") from None


# ── Writing ──


def save(model: Transformer, directory, shard_bytes: int = SHARD_BYTES) -> None:
    """Write our own format; the directory appears at once, complete, or stays as it was."""
    with atomic_dir(directory) as tmp:
        write_safetensors(tmp, asdict(model.config), model.state_dict(), shard_bytes)


def save_hf(model: Transformer, directory, shard_bytes: int = SHARD_BYTES, **fields) -> None:
    """Write what transformers reads; `fields` go to config.json (`eos_token_id=1`)."""
    c = model.config
    config = config_to_hf(c, model.embed.weight.dtype) | fields
    tensors = {}
    for name, t in model.state_dict().items():
        rows = t.unbind() if t.ndim == 3 else [t.float() if is_bias(name) else t]
        tensors |= zip(hf_names(name, c), rows, strict=True)
    with atomic_dir(directory) as tmp:
        write_safetensors(tmp, config, tensors, shard_bytes)


def write_safetensors(
    directory: Path, config: dict, tensors: dict[str, torch.Tensor], shard_bytes: int
) -> None:
    """config.json and safetensors, with an index if one file would exceed `shard` bytes."""
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    groups = group_by_size({name: t.nbytes for name, t in tensors.items()}, shard_bytes)
    where = {}
    for i, names in enumerate(groups, start=1):
        file = WEIGHTS if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        held = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(held, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def group_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes (a larger tensor is alone)."""
    groups, used = [[]], 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


# ── Directories ──


def list_checkpoints(run) -> list[Path]:
    """The checkpoints of a training run, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step_*"))


def resolve_checkpoint_dir(directory) -> Path:
    """The directory to read: of a run the newest checkpoint, of a killed save the one set aside."""
    path = Path(directory)
    if found := list_checkpoints(path):
        return found[-1]
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; a checkpoint is a directory")
    if path.name and (aside := temp_sibling(path, OLD)).is_dir():
        return aside
    raise UserError(f"there is no directory {path}")


def find_tokenizer_dir(path: Path) -> Path:
    """The folder with tokenizer.json: the path itself, or the run that a checkpoint is in."""
    places = [path, *path.resolve().parents[:2]]
    return next((p for p in places if (p / "tokenizer.json").is_file()), path)
