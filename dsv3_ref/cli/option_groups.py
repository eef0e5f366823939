"""Headings of `dsv3 COMMAND --help`: which options stand together.

tyro gives the fields of a nested dataclass a heading. The dataclasses of our options are flat, so
`grouping_registry` presents each group of their fields to tyro as a nested struct without a prefix:
`--lr` is listed under “optimizer options” and stays `--lr`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

Groups = dict[str, str]  # heading → names of fields; "" lists nested dataclasses to leave alone

RECIPE: Groups = {
    "data": "seq_len start_batch_size global_batch_size batch_rampup_frac",
    "optimizer": "steps lr min_lr final_lr warmup_steps decay_start decay_end final_start"
    " weight_decay beta1 beta2 max_grad_norm",
    "loss": "mtp_weight mtp_weight_end balance_loss_coeff balance_loss_scope bias_update_rate",
}
TRAIN: Groups = {
    "model": "config init",
    "data": "data val_data streaming data_streams tokenizer fim_rate",
    "": "recipe",
    "optimizer": "optimizer_dtype ema_decay skip_grad_norm_factor grad_norm_window"
    " max_skipped_steps",
    "computation": "device precision micro_batch recompute seed deterministic",
    "parallelism": "pp ep dp cp schedule zero fully_shard ep_ranks_per_node dispatch_dtype"
    " dispatch_capacity token_dispatcher dispatch_sms hang_timeout",
    "checkpoint": "out resume verify save_every keep_latest_k",
    "logging": "val_sequences log expert_load_every peak_tflops profile memory_snapshot"
    " profile_ranks",
}
GENERATE: Groups = {
    "sampling": "max_new_tokens temperature top_p stop seed",
    "computation": "num_speculative_tokens compile device verify",
}
OPTION_GROUPS: dict[str, Groups] = {
    "data prepare": {
        "data": "data streaming tokenizer vocab_size dedup",
        "output": "out shard_tokens",
        "computation": "workers",
    },
    "data bench": {
        "data": "data megabytes",
        "measurement": "rounds workers",
        "cluster": "config pp ep dp cp seq_len global_batch_size data_streams",
        "output": "out",
    },
    "train": TRAIN,
    "extend": {"extension": "phase needles"} | TRAIN,
    "sft": {**TRAIN, "data": "data val_data epochs tokenizer"},
    "reward": {
        "reward model": "judge with_reference judgment_weight",
        **TRAIN,
        "data": "data val_data epochs tokenizer",
    },
    "rl": {
        "problem": "tasks system",
        "rollout": "num_generations max_new_tokens temperature rollout_backend vllm_tp rollout"
        " rollout_dir sampler_cap max_sampling_logp_difference",
        "reward": "reward votes require_think_format negative_control",
        "objective": "loss_type scale_rewards epsilon epsilon_high beta steps_per_generation"
        " max_kl",
        **TRAIN,
        "data": "tokenizer",
    },
    "align": {
        "training": "steps epochs distill",
        "study": "seeds negative_controls",
        "checkpoint": "init out",
    },
    "generate": {"text": "prompt"} | GENERATE,
    "chat": {"text": "system"} | GENERATE | {"web page": "web host port allowed_hosts api_key"},
    "serve": {
        "server": "host port served_model_name max_queue max_connections grace",
        "access": "api_key allow_unauthenticated allowed_hosts allowed_origins"
        " report_cached_tokens separate_reasoning reload_root",
        "scheduler": "max_num_seqs max_n prefill_chunk",
        "cache": "kv_cache_tokens block_size",
        "sampling": "max_new_tokens seed generation_config",
        "computation": "num_speculative_tokens prefill_workers device verify",
    },
    "explain": {"page": "out prompts"},
    "check": {},
    "export": {
        "format": "like fp8 dtype shard_bytes",
        "output": "gguf gguf_type push",
        "computation": "verify",
    },
    "eval": {
        "task": "tasks num_fewshot fewshot_as_multiturn limit system apply_chat_template truncate",
        "sampling": "samples temperature max_new_tokens seed",
        "computation": "batch_size device verify",
        "output": "out log_samples",
    },
    "plan": {
        "training": "config seq_len global_batch_size micro_batch precision",
        "parallelism": "pp ep dp cp schedule zero fully_shard gpus ep_ranks_per_node"
        " dispatch_capacity",
        "hardware": "hardware",
        "serving": "unit context",
        "output": "out",
    },
    "preflight": {
        "job": "folder gpus ranks min_nodes",
        "threshold": "min_free_gb min_disk_mb_s min_node_gb_s min_net_gb_s max_skew_s",
        "measurement": "message_mb timeout_s",
        "Slurm step": "stage rendezvous",
    },
    "bench": {"measurement": "parts rounds threads", "output": "out"},
    "ablate": {"training": "seeds steps config data", "output": "out"},
}


@dataclass(frozen=True)
class OptionGroup:
    """The fields of an options dataclass that stand under one heading."""

    fields: tuple[StructFieldSpec, ...]


def grouping_registry(groups: Mapping[type, Groups]) -> ConstructorRegistry:
    """Return a registry for `tyro.cli` that lists the fields of these dataclasses in groups."""
    registry = ConstructorRegistry()
    expanding: list[type] = []  # dataclasses whose ungrouped form is being asked for

    @registry.struct_rule
    def group_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
        if isinstance(info.default, OptionGroup):
            return StructConstructorSpec(dict, info.default.fields)
        if info.type not in groups or info.type in expanding:
            return None
        expanding.append(info.type)
        try:
            flat = ConstructorRegistry.get_struct_spec(info)
        finally:
            expanding.pop()
        if not isinstance(flat, StructConstructorSpec):
            return None
        spec = group_spec(flat, groups[info.type])
        spec.instantiate.__doc__ = info.type.__doc__  # the description above the options
        return spec

    return registry


def group_spec(flat: StructConstructorSpec, groups: Groups) -> StructConstructorSpec:
    """Return a constructor with a struct per heading; fields without one come last, as they are."""
    fields = {field.name: field for field in flat.fields}
    grouped: list[StructFieldSpec] = []
    for heading, names in groups.items():
        members = tuple(fields.pop(name) for name in names.split())
        grouped += [group_field(heading, members)] if heading else members

    def instantiate(**values: Any) -> Any:
        options: dict[str, Any] = {}
        for name, value in values.items():
            options |= value if " " in name else {name: value}
        return flat.instantiate(**options)

    return StructConstructorSpec(instantiate, (*grouped, *fields.values()))


def group_field(heading: str, members: tuple[StructFieldSpec, ...]) -> StructFieldSpec:
    """Return the field for the struct of a heading; its name has a space, as no option's has."""
    kind: Any = Annotated[OptionGroup, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name=heading)]
    group = OptionGroup(tuple(replace(x, helptext=join_lines(x)) for x in members))
    return StructFieldSpec(f"{heading} options", kind, group, helptext="")


def join_lines(field: StructFieldSpec) -> str:
    """Return the help text of an option as one line, which tyro then wraps."""
    text = field.helptext() if callable(field.helptext) else field.helptext
    return " ".join((text or "").split())
