"""`dsv3 COMMAND …`: the options come from the dataclasses, by tyro."""

import os
import shlex
import sys

from dsv3_ref.config import UserError


def train(argv: list[str]) -> None:
    """dsv3 train: from text to a checkpoint and a report."""
    from dsv3_ref.training.settings import parse_args

    args = parse_args(argv)
    runner()(args, shlex.join(["dsv3", "train", *argv]))


def sft(argv: list[str]) -> None:
    """dsv3 sft: fine-tune on conversations."""
    from dsv3_ref.posttraining.sft import SFTConfig, SftTrainer

    tune(SFTConfig, SftTrainer, argv)


def extend(argv: list[str]) -> None:
    """dsv3 extend: teach a model to read longer texts."""
    from dsv3_ref.training.extend import ExtendConfig, ExtendTrainer

    tune(ExtendConfig, ExtendTrainer, argv)


def reward(argv: list[str]) -> None:
    """dsv3 reward: a reward model from pairs of answers."""
    from dsv3_ref.posttraining.reward import RewardConfig, RewardTrainer

    tune(RewardConfig, RewardTrainer, argv)


def rl(argv: list[str]) -> None:
    """dsv3 rl: GRPO on tasks."""
    from dsv3_ref.posttraining.grpo import GRPOConfig, RlTrainer

    tune(GRPOConfig, RlTrainer, argv)


def tune(kind, trainer, argv: list[str]) -> None:
    """A run that starts from a model."""
    from dsv3_ref.training.settings import parse_args

    args = parse_args(argv, kind)
    runner()(args, shlex.join(["dsv3", kind.COMMAND, *argv]), trainer)


def runner():
    """What runs a `Trainer`: this process, or it and its fellow ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from dsv3_ref.parallel.mesh_parallel import run
    else:
        from dsv3_ref.training.loop import run  # after --help: it takes seconds to import
    return run


def generate(argv: list[str]) -> None:
    """dsv3 generate: continue a text."""
    import tyro

    from dsv3_ref.serving.generate import GenerateConfig, run_generate

    run_generate(tyro.cli(GenerateConfig, prog="dsv3 generate", args=argv))


def chat(argv: list[str]) -> None:
    """dsv3 chat: talk to a model."""
    import tyro

    from dsv3_ref.serving.generate import ChatConfig, run_chat

    run_chat(tyro.cli(ChatConfig, prog="dsv3 chat", args=argv))


def serve(argv: list[str]) -> None:
    """dsv3 serve: an OpenAI-compatible endpoint."""
    import tyro

    from dsv3_ref.serving.api_server import ServeConfig, run_server

    run_server(tyro.cli(ServeConfig, prog="dsv3 serve", args=argv))


def bench(argv: list[str]) -> None:
    """dsv3 bench: speed and memory beside transformers."""
    import tyro

    from dsv3_ref.studies.bench import BenchConfig, run_bench

    run_bench(tyro.cli(BenchConfig, prog="dsv3 bench", args=argv))


def ablate(argv: list[str]) -> None:
    """dsv3 ablate: one part changed, all else equal, several seeds."""
    from dsv3_ref.studies import ablate

    ablate.run_ablation(ablate.parse_options(argv), shlex.join(["dsv3", "ablate", *argv]))


def align(argv: list[str]) -> None:
    """dsv3 align: fine-tuning, reward model and GRPO in one go."""
    import tyro

    from dsv3_ref.studies.align import AlignConfig, align

    align(tyro.cli(AlignConfig, prog="dsv3 align", args=argv))


def data(argv: list[str]) -> None:
    """dsv3 data: text into shards, and their check."""
    from dsv3_ref.data.prepare import main

    main(argv)


def evaluate(argv: list[str]) -> None:
    """dsv3 eval: how good is a model?"""
    import tyro

    from dsv3_ref.evaluation.evaluate import EvalConfig, evaluate

    evaluate(tyro.cli(EvalConfig, prog="dsv3 eval", args=argv))


def preflight(argv: list[str]) -> None:
    """dsv3 preflight: which nodes of a job are fit to train."""
    import tyro

    from dsv3_ref.cluster.preflight import Preflight, preflight

    preflight(tyro.cli(Preflight, prog="dsv3 preflight", args=argv))


def plan(argv: list[str]) -> None:
    """dsv3 plan: what a cluster would hold, send and cost."""
    import tyro

    from dsv3_ref.cluster.plan import Plan, plan

    plan(tyro.cli(Plan, prog="dsv3 plan", args=argv))


COMMANDS = {
    "train": train, "data": data, "extend": extend, "sft": sft, "reward": reward, "rl": rl,
    "align": align, "eval": evaluate, "generate": generate, "chat": chat, "serve": serve,
    "bench": bench, "ablate": ablate,
    "preflight": preflight, "plan": plan,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    if argv is None:
        leave(main(sys.argv[1:]))
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: dsv3 {{{','.join(COMMANDS)}}} …  (--help after a command lists its options)")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except SystemExit as e:  # --help, or tyro has said what is wrong
        return e.code
    except KeyboardInterrupt:
        return 130
    return 0


def leave(code: int) -> None:
    """End the process at once: Python's own end may hang after Parquet (apache/arrow#50482)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
