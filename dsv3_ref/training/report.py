"""The report of a run: `report.html`, one file that any browser can open.

It shows `metrics.jsonl`, `run.json` and `summary.json` of a run directory. Files that do not exist
yet are left out, so that the report can be written during the run, too:
`python -m dsv3_ref.training.report runs/tiny`.
"""

import argparse
import bz2
import gzip
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dsv3_ref.checkpoints.atomic import clear_path, read_json
from dsv3_ref.config import UserError
from dsv3_ref.viz import page, rl, training
from dsv3_ref.viz.training import has, last, read_metrics, series

Rows = list[dict[str, Any]]  # of metrics.jsonl
Summary = dict[str, Any]  # of summary.json, {} if there is none yet

OURS = "this model"
KEYS = ("tokens", "seconds", "val_loss", "val_loss_ema", "val_bpb")

# ── Baselines ──


def compute_baselines(
    text: str, unigram_counts: Sequence[int], tokens: Iterable[int]
) -> dict[str, float]:
    """Return the bits per byte of a text with gzip -9, bzip2 -9 and a unigram model.

    The unigram model needs −Σ log₂ p(token) / bytes, with add-one smoothing p(w) = (count + 1) /
    (total + vocabulary). unigram_counts[w]: occurrences of token w in the training text, zeros
    included; tokens: the ids of `text`.
    """
    data = text.encode()
    if not data:
        raise ValueError("no text to measure")
    total = sum(unigram_counts) + len(unigram_counts)
    unigram = -sum(math.log2((unigram_counts[w] + 1) / total) for w in tokens)
    return {
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "bzip2": 8 * len(bz2.compress(data, 9)) / len(data),
        "unigram": float(unigram) / len(data),
    }


# ── Results of the run ──


def read_if_exists(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if the file does not exist."""
    return read_json(path) if path.is_file() else {}


def collect_key_numbers(rows: Rows, summary: Summary) -> dict[str, str]:
    """Return the key numbers by name, formatted, from the summary or else from the last rows."""
    values = {key: series(rows, key)[1][-1] for key in KEYS if has(rows, key)}
    values |= {key: summary[key] for key in KEYS if summary.get(key) is not None}
    numbers = {"steps": f"{rows[-1]['step']:,}"} if rows else {}
    if "tokens" in values:
        numbers["tokens"] = f"{values['tokens']:,.0f}"
    if "seconds" in values:
        numbers["minutes"] = f"{values['seconds'] / 60:,.1f}"
    if has(rows, "loss"):
        numbers["training loss"] = f"{last(rows, 'loss'):.3f}"
    if held_out := rows and rows[-1].get("held_out"):
        numbers |= {f"{name}, held out": f"{x['greedy']:.1%}" for name, x in held_out.items()}
    elif "val_loss" in values:
        numbers["validation loss"] = f"{values['val_loss']:.3f}"
    if "val_loss_ema" in values:
        numbers["with averaged weights"] = f"{values['val_loss_ema']:.3f}"
    if "val_bpb" in values:
        numbers["bits per byte"] = f"{values['val_bpb']:.3f}"
    return numbers


def collect_bits_per_byte(rows: Rows, summary: Summary) -> dict[str, float]:
    """Return the bits per byte on the validation text, of this model and of the baselines."""
    ours = summary.get("val_bpb")
    if ours is None and has(rows, "val_bpb"):
        ours = float(series(rows, "val_bpb")[1][-1])
    return ({OURS: ours} if ours is not None else {}) | (summary.get("baselines") or {})


# ── Parts of the page ──


def describe_results(numbers: dict[str, str], bits: dict[str, float], is_finished: bool) -> str:
    """Describe the run in one paragraph that needs no figure."""
    if "steps" not in numbers:
        return "No step is finished yet: write the report again later."
    run = f"{numbers['steps']} step{'' if numbers['steps'] == '1' else 's'}"
    run += f" over {numbers['tokens']} tokens" if "tokens" in numbers else ""
    run += f" in {numbers['minutes']} minutes" if "minutes" in numbers else ""
    run += "." if is_finished else " so far; the run is not finished."
    sentences = [run]
    losses = [f"{k} {numbers[k]}" for k in ("training loss", "validation loss") if k in numbers]
    if losses:
        sentences.append(f"{' and '.join(losses).capitalize()} nats per token.")
    if OURS in bits:
        others = ", ".join(f"{k} {v:.2f}" for k, v in bits.items() if k != OURS)
        sentences.append(
            f"The validation text takes {bits[OURS]:.3f} bits per byte"
            + (f" ({others})." if others else ".")
        )
    return " ".join(sentences)


def describe_skips(rows: Rows) -> str:
    """Describe how many steps were skipped and how often the run was rolled back; "" if never."""
    reasons = Counter(row["skipped"] for row in rows if row.get("skipped"))
    rollbacks = sum(row.get("rolled_back_from") is not None for row in rows)
    parts = [f"{n} step{'s' * (n > 1)} skipped ({reason})" for reason, n in reasons.items()]
    if rollbacks:
        parts.append(f"{rollbacks} rollback{'s' * (rollbacks > 1)} to a checkpoint")
    return f"Interruptions: {', '.join(parts)}." if parts else ""


def render_intro(rows: Rows, run: dict[str, Any], summary: Summary) -> str:
    """Render the top of the page: a paragraph, tiles with key numbers, and the command."""
    numbers = collect_key_numbers(rows, summary)
    words = describe_results(numbers, collect_bits_per_byte(rows, summary), bool(summary))
    words = f"{words} {describe_skips(rows)}".strip()
    html = f"<p>{page.text(words)}</p>{page.tiles(numbers) if numbers else ''}"
    if run.get("command"):
        html += f'<p class="soft">Made by <code>{page.text(join_words(run["command"]))}</code></p>'
    return html


def join_words(command: str | list[str]) -> str:
    """Return a command as one line, whether it was stored as a line or as a list of words."""
    return command if isinstance(command, str) else " ".join(map(str, command))


def render_bits(rows: Rows, summary: Summary) -> str:
    """Render bits per byte as bars and as tables, by model and by source."""
    bits, by_source = collect_bits_per_byte(rows, summary), summary.get("val_bpb_by_source")
    html = ""
    if bits:
        caption = (
            "Cross-entropy of the validation text in bits, divided by its bytes, so that models "
            "with different tokenizers and plain compressors can be compared. The unigram model "
            "uses only the frequency of each token in the training text."
        )
        ordered = dict(sorted(bits.items(), key=lambda item: item[1]))
        html += page.drawing(training.plot_bits_per_byte(bits, OURS), "bits", caption)
        html += page.table(ordered, "The same as a table", ("model", "bits per byte"), OURS, 3)
    if by_source:
        caption, head = f"Held-out text of every source, {OURS}", ("source", "bits per byte")
        html += page.table(by_source, caption, head, digits=3)
    return html


def render_samples(samples: list[dict[str, Any]]) -> str:
    """Render the model's texts, with the prompts highlighted."""
    if not samples:
        return ""
    html = "<p>The <mark>prompt</mark> was given; the model wrote the rest.</p>"
    for sample in samples:
        prompt, written = sample.get("prompt", ""), sample.get("text", "")
        written = written.removeprefix(prompt)
        if sample.get("temperature") is not None:
            html += f'<p class="soft">Temperature {page.text(sample["temperature"])}</p>'
        if "before" in sample:
            written = f"\nbefore: {sample['before']}\nafter:  {written}"
        html += f"<pre><mark>{page.text(prompt)}</mark>{page.text(written)}</pre>"
    return html


def render_loads(rows: Rows, names: list[str]) -> str:
    """Render a heatmap of expert loads per MoE layer."""
    if not has(rows, "expert_load"):
        return ""
    layers = min(training.MAX_PANELS, series(rows, "expert_load")[1].shape[1])
    names = training.layer_names(layers, names)
    return f"<p>{page.text(CAPTIONS['expert_load'])}</p>" + "".join(
        page.drawing(training.plot_expert_load(rows, i, name), f"load{i}")
        for i, name in enumerate(names)
    )


def render_settings(run: dict[str, Any]) -> str:
    """Render model, training settings and parameter counts as one table each."""
    parts = {"model": "Model", "settings": "Training", "params": "Parameters"}
    tables = {title: flatten(run.get(key) or {}) for key, title in parts.items()}
    tables["Training"] = {k: v for k, v in tables["Training"].items() if not k.startswith("model.")}
    html = "".join(page.table(rows, title) for title, rows in tables.items() if rows)
    return html and f'<div class="tables">{html}</div>'


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level: {"recipe": {"lr": 1}} becomes {"recipe.lr": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if is_nested else {f"{prefix}{name}": value}
    return flat


def render_origin(run: dict[str, Any]) -> str:
    """Render the command, the commit and the versions that produced the run."""
    origin = {"command": join_words(run["command"])} if run.get("command") else {}
    origin |= {"commit": run["commit"]} if run.get("commit") else {}
    origin |= run.get("versions") or {}
    return page.table(origin, "Enough to repeat the run") if origin else ""


CAPTIONS = {
    "loss": "Pale: every step; strong: running mean; diamonds: validation. MTP depth k predicts "
    "k tokens further ahead, which is harder.",
    "reward": "Pale: the answers of every step; strong: running mean. Diamonds: greedy answers to "
    "held-out problems, before the first step and at every checkpoint.",
    "watch": "Typical failures: the KL grows without bound, the entropy falls to 0, or answers get "
    "longer without more reward.",
    "expert_load": "One row per expert, one column per step. White: the expert gets its even share "
    "of the tokens; orange: more, blue: less.",
    "expert_bias": "The bias is added to the affinity when experts are chosen, but not to their "
    "weight: it rises for underloaded experts and falls for overloaded ones. Gray: the other "
    "experts.",
    "max_vio": "Load of the busiest expert of a layer above the mean load (running mean).",
    "schedule": "Settings that change during the run, at every step.",
    "grad_norm": "Pale: every step; strong: running mean. Clipping limits most spikes; "
    "steps with the largest norms were skipped (crosses).",
    "tokens_per_s": "Pale: every step; strong: running mean.",
}


def render_sections(rows: Rows, run: dict[str, Any], summary: Summary) -> dict[str, str]:
    """Return heading → HTML of all sections that have content, in the order of the page."""
    names = run.get("moe_layers") or []

    def plot(key: str, function: Callable[..., Figure], *args: Any) -> str:
        keys = {"schedule": training.SCHEDULE_PANELS, "watch": [*rl.RL_PANELS]}.get(key, [key])
        if not any(has(rows, k) for k in keys):
            return ""
        return page.drawing(function(rows, *args), key, CAPTIONS[key])

    before = summary.get("before")
    sections = {
        "Reward": plot("reward", rl.plot_rewards, before),
        "Watch": plot("watch", rl.plot_rl_metrics),
        "Loss": "" if has(rows, "reward") else plot("loss", training.plot_loss),
        "Bits per byte": render_bits(rows, summary),
        "Samples": render_samples(summary.get("samples") or []),
        "Expert load": render_loads(rows, names),
        "Gate biases": plot("expert_bias", training.plot_expert_bias, names),
        "Balance": plot("max_vio", training.plot_max_vio, names),
        "Schedule": plot("schedule", training.plot_schedule),
        "Gradient norm": plot("grad_norm", training.plot_grad_norm),
        "Speed": plot("tokens_per_s", training.plot_throughput),
        "Settings": render_settings(run),
        "Origin": render_origin(run),
    }
    return {heading: html for heading, html in sections.items() if html}


# ── The file ──


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into the directory of a finished or running run; return its path."""
    run_dir = Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(
            f"{run_dir} holds no metrics.jsonl: give the directory of a training run, such as "
            "runs/tiny"
        )
    rows, run = read_metrics(metrics), read_if_exists(run_dir / "run.json")
    summary = read_if_exists(run_dir / "summary.json")
    title = f"Training run {run_dir.resolve().name}"
    sections = render_sections(rows, run, summary)
    html = page.page(title, render_intro(rows, run, summary), sections)
    part, path = run_dir / "report.html.part", run_dir / "report.html"
    clear_path(part)  # it may be a link
    part.write_text(html, encoding="utf-8", errors="backslashreplace")  # names of files: any bytes
    os.replace(part, path)  # a browser that reloads never reads a partial page
    return path


def main() -> None:
    """Write the report of the directory on the command line and print its path."""
    parser = argparse.ArgumentParser(description="Write report.html into a run's directory.")
    parser.add_argument("run_dir", type=Path, help="for example runs/tiny")
    try:
        print(write_report(parser.parse_args().run_dir))
    except UserError as e:
        sys.exit(f"error: {e}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        sys.exit(f"error: the run holds values that cannot be shown ({e}): correct its files")


if __name__ == "__main__":
    main()
