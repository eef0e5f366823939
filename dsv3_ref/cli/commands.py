"""The table of `dsv3` commands: what each is for, and where its options and its code are."""

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Command:
    """One command of `dsv3`; the names in modules are imported only when it runs."""

    summary: str  # one sentence for `dsv3 --help`
    options: str  # the dataclass of its options
    function: str = ""  # called with the options
    task: str = ""  # or: the task of a training run, on this process or on all ranks
    stores_record: bool = False  # the function stores the record of the run with its results


COMMANDS: dict[str, dict[str, Command]] = {
    "Data and files": {
        "data prepare": Command(
            "Tokenize text once, into shards that `dsv3 train --data` reads.",
            "dsv3_ref.data.prepare.PrepareConfig",
            "dsv3_ref.data.prepare.prepare_shards",
            stores_record=True,
        ),
        "data bench": Command(
            "Measure how fast text becomes shards and shards become batches.",
            "dsv3_ref.studies.data_bench.DataBenchConfig",
            "dsv3_ref.studies.data_bench.run_data_bench",
            stores_record=True,
        ),
        "export": Command(
            "Write a model as a directory for transformers, vLLM, SGLang and lm-eval.",
            "dsv3_ref.export.command.ExportConfig",
            "dsv3_ref.export.command.run_export",
        ),
        "check": Command(
            "Verify the files of a run, a model or a folder of shards by their checksums.",
            "dsv3_ref.training.check.CheckConfig",
            "dsv3_ref.training.check.run_check",
        ),
    },
    "Training": {
        "train": Command(
            "Pre-train a model on text, with checkpoints and a report.",
            "dsv3_ref.training.settings.TrainConfig",
            task="dsv3_ref.training.task.PretrainTask",
        ),
        "extend": Command(
            "Extend the context length of a model with YaRN.",
            "dsv3_ref.training.extend.ExtendConfig",
            task="dsv3_ref.training.extend.ExtendTask",
        ),
        "sft": Command(
            "Fine-tune a model on conversations.",
            "dsv3_ref.posttraining.sft.SFTConfig",
            task="dsv3_ref.posttraining.sft.SFTTask",
        ),
        "reward": Command(
            "Train a reward model on pairs of answers.",
            "dsv3_ref.posttraining.reward.RewardConfig",
            task="dsv3_ref.posttraining.reward.RewardTask",
        ),
        "rl": Command(
            "Train a model with GRPO on problems with verifiable or modeled rewards.",
            "dsv3_ref.posttraining.grpo.GRPOConfig",
            task="dsv3_ref.posttraining.grpo.GRPOTask",
        ),
        "align": Command(
            "Run supervised fine-tuning, a reward model and GRPO one after another.",
            "dsv3_ref.studies.align.AlignConfig",
            "dsv3_ref.cli.align.run_align",
        ),
    },
    "Inference": {
        "generate": Command(
            "Continue a text.",
            "dsv3_ref.serving.config.GenerateConfig",
            "dsv3_ref.serving.generate.run_generate",
        ),
        "chat": Command(
            "Chat with a model in the terminal or in a browser.",
            "dsv3_ref.serving.config.ChatConfig",
            "dsv3_ref.serving.generate.run_chat",
        ),
        "explain": Command(
            "Write an HTML page that runs a small model and shows what each part does.",
            "dsv3_ref.studies.explain.ExplainConfig",
            "dsv3_ref.studies.explain.run_explain",
        ),
        "serve": Command(
            "Serve a model behind an OpenAI-compatible API.",
            "dsv3_ref.serving.config.ServeConfig",
            "dsv3_ref.serving.api_server.run_server",
        ),
        "eval": Command(
            "Evaluate a model on built-in tasks, problems from files or lm-eval tasks.",
            "dsv3_ref.evaluation.evaluate.EvalConfig",
            "dsv3_ref.evaluation.evaluate.evaluate_checkpoint",
            stores_record=True,
        ),
    },
    "Cluster": {
        "plan": Command(
            "Compute the memory, traffic and cost of training on a cluster.",
            "dsv3_ref.cluster.plan.PlanConfig",
            "dsv3_ref.cluster.plan.print_plan",
        ),
        "preflight": Command(
            "Check the nodes of a job and exclude unhealthy ones.",
            "dsv3_ref.cluster.preflight.PreflightConfig",
            "dsv3_ref.cluster.preflight.run_preflight",
        ),
    },
    "Measurements": {
        "bench": Command(
            "Benchmark speed and memory against transformers.",
            "dsv3_ref.studies.bench.BenchConfig",
            "dsv3_ref.studies.bench.run_bench",
            stores_record=True,
        ),
        "ablate": Command(
            "Train variants of one part of the model on equal data and compare them.",
            "dsv3_ref.studies.ablate.AblateConfig",
            "dsv3_ref.studies.ablate.run_ablation",
            stores_record=True,
        ),
    },
}
BY_NAME = dict(chain.from_iterable(group.items() for group in COMMANDS.values()))
