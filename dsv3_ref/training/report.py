"""The page a run leaves behind: `report.html`, one file that opens anywhere.

Reads `metrics.jsonl`, `run.json` and `summary.json` of a run directory, as far as they exist, so it
can be written while the run goes on: `python -m dsv3_ref.training.report runs/tiny`.
"""

import argparse
import bz2
import gzip
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

from dsv3_ref.config import UserError
from dsv3_ref.viz import page, rl, training
from dsv3_ref.viz.training import has, last, read_metrics, series

OURS = "this model"

# ── What to compare with ──


def baselines(text: str, unigram_counts, tokens) -> dict[str, float]:
    """Bits per byte of `text` with gzip -9, bzip2 -9 and single tokens: −Σ log₂ p(token) / bytes.

    `unigram_counts[w]`: how often token w occurs in the training tokens, zeros included, with
    add-one smoothing p(w) = (count + 1) / (total + vocabulary); `tokens`: the ids of `text`.
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


# ── What a run left ──


def read_json(path: Path) -> dict:
    """The file's object, or an empty one where there is no file yet."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not JSON: {e}") from None


def headline(rows: list[dict], summary: dict) -> dict[str, str]:
    """The key numbers by name, those that are known: from the summary, else from the last rows."""
    seen = {key: series(rows, key)[1][-1] for key in KEYS if has(rows, key)}
    seen |= {key: summary[key] for key in KEYS if summary.get(key) is not None}
    known = {"steps": f"{rows[-1]['step']:,}"} if rows else {}
    if "tokens" in seen:
        known["tokens"] = f"{seen['tokens']:,.0f}"
    if "seconds" in seen:
        known["minutes"] = f"{seen['seconds'] / 60:,.1f}"
    if has(rows, "loss"):
        known["training loss"] = f"{last(rows, 'loss'):.3f}"
    if held := rows and rows[-1].get("held_out"):
        known |= {f"{name}, held out": f"{x['greedy']:.1%}" for name, x in held.items()}
    elif "val_loss" in seen:
        known["validation loss"] = f"{seen['val_loss']:.3f}"
    if "val_loss_ema" in seen:
        known["with averaged weights"] = f"{seen['val_loss_ema']:.3f}"
    if "val_bpb" in seen:
        known["bits per byte"] = f"{seen['val_bpb']:.3f}"
    return known


KEYS = ("tokens", "seconds", "val_loss", "val_loss_ema", "val_bpb")


def compression(rows: list[dict], summary: dict) -> dict[str, float]:
    """Bits per byte on the validation text, of this model and of what it is compared with."""
    ours = summary.get("val_bpb")
    if ours is None and has(rows, "val_bpb"):
        ours = float(series(rows, "val_bpb")[1][-1])
    return ({OURS: ours} if ours is not None else {}) | (summary.get("baselines") or {})


# ── Parts of the page ──


def sentence(known: dict[str, str], bits: dict[str, float], done: bool) -> str:
    """The run in a paragraph, in words that need no figure."""
    if "steps" not in known:
        return "No step is finished yet: write the report again in a moment."
    run = f"{known['steps']} step{'' if known['steps'] == '1' else 's'}"
    run += f" over {known['tokens']} tokens" if "tokens" in known else ""
    run += f" in {known['minutes']} minutes" if "minutes" in known else ""
    out = [run + ("" if done else " so far; the run has left no summary yet") + "."]
    losses = [f"{k} {known[k]}" for k in ("training loss", "validation loss") if k in known]
    if losses:
        out.append(f"{' and '.join(losses).capitalize()} nats a token.")
    if OURS in bits:
        others = ", ".join(f"{k} {v:.2f}" for k, v in bits.items() if k != OURS)
        out.append(
            f"The validation text takes {bits[OURS]:.3f} bits per byte"
            + (f" ({others})." if others else ".")
        )
    return " ".join(out)


def trouble(rows: list[dict]) -> str:
    """Steps that were not taken, and how often the run went back."""
    why = Counter(row["skipped"] for row in rows if row.get("skipped"))
    back = sum(row.get("rolled_back_from") is not None for row in rows)
    said = [f"{n} step{'s' * (n > 1)} skipped ({reason})" for reason, n in why.items()]
    said += [f"{back} time{'s' * (back > 1)} back to a checkpoint"] if back else []
    return ", ".join(said) and f"Trouble: {', '.join(said)}."


def intro(rows: list[dict], run: dict, summary: dict) -> str:
    """Paragraph, tiles and the command, above everything else."""
    known = headline(rows, summary)
    words = sentence(known, compression(rows, summary), bool(summary))
    words = f"{words} {trouble(rows)}".strip()
    out = f"<p>{page.text(words)}</p>{page.tiles(known) if known else ''}"
    if run.get("command"):
        out += f'<p class="soft">Made by <code>{page.text(words_of(run["command"]))}</code></p>'
    return out


def words_of(command) -> str:
    """A command as one line, whether it was stored as a line or as a list of words."""
    return command if isinstance(command, str) else " ".join(map(str, command))


def bits_section(rows: list[dict], summary: dict) -> str:
    """Bits per byte as bars and as a table, then by source."""
    bits, by_source = compression(rows, summary), summary.get("val_bpb_by_source")
    out = ""
    if bits:
        caption = (
            "Cross-entropy of the validation text in bits, divided by its bytes, so that models "
            "with different tokens and plain compressors can be compared. The unigram model knows "
            "only how often each token occurred in training."
        )
        ordered = dict(sorted(bits.items(), key=lambda item: item[1]))
        out += page.drawing(training.plot_bits_per_byte(bits, OURS), "bits", caption)
        out += page.table(ordered, "The same in numbers", ("model", "bits per byte"), OURS, 3)
    if by_source:
        caption, head = f"Held-out text of every source, {OURS}", ("source", "bits per byte")
        out += page.table(by_source, caption, head, digits=3)
    return out


def sample_section(samples: list[dict]) -> str:
    """What the model wrote, its prompt highlighted."""
    out = "<p>The <mark>prompt</mark> was given; the model wrote the rest.</p>" if samples else ""
    for s in samples:
        prompt, written = s.get("prompt", ""), s.get("text", "")
        written = written.removeprefix(prompt)
        if s.get("temperature") is not None:
            out += f'<p class="soft">Temperature {page.text(s["temperature"])}</p>'
        if "before" in s:
            written = f"\nbefore: {s['before']}\nafter:  {written}"
        out += f"<pre><mark>{page.text(prompt)}</mark>{page.text(written)}</pre>"
    return out


def load_section(rows: list[dict], names: list[str]) -> str:
    """A heatmap for every MoE layer."""
    if not has(rows, "expert_load"):
        return ""
    names = training.layer_names(series(rows, "expert_load")[1].shape[1], names)
    return f"<p>{page.text(CAPTIONS['expert_load'])}</p>" + "".join(
        page.drawing(training.plot_expert_load(rows, i, name), f"load{i}")
        for i, name in enumerate(names)
    )


def settings_section(run: dict) -> str:
    """Model, training settings and parameter counts, a table each."""
    parts = {"model": "Model", "settings": "Training", "params": "Parameters"}
    found = {title: flat(run.get(key) or {}) for key, title in parts.items()}
    found["Training"] = {k: v for k, v in found["Training"].items() if not k.startswith("model.")}
    tables = "".join(page.table(rows, title) for title, rows in found.items() if rows)
    return tables and f'<div class="tables">{tables}</div>'


def flat(values: dict, prefix: str = "") -> dict:
    """Nested settings in one level: {"recipe": {"lr": 1}} becomes {"recipe.lr": 1}."""
    out = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        out |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return out


def origin_section(run: dict) -> str:
    """Where the numbers come from: command, commit, versions."""
    origin = {"command": words_of(run["command"])} if run.get("command") else {}
    origin |= {"commit": run["commit"]} if run.get("commit") else {}
    origin |= run.get("versions") or {}
    return page.table(origin, "Enough to make the run again") if origin else ""


CAPTIONS = {
    "loss": "Pale: every step; strong: running mean; diamonds: validation. MTP depth k predicts "
    "k tokens further ahead, which is harder.",
    "reward": "Pale: every step's answers; strong: running mean. Diamonds: the likeliest answers "
    "to problems that are never practiced on, before the first step and at every checkpoint.",
    "watch": "A KL that runs away, an entropy near 0 or answers that grow without more reward are "
    "the usual ways to go wrong.",
    "expert_load": "A row an expert, a column a time. White: the expert gets its even share of the "
    "tokens; orange: more, blue: less.",
    "expert_bias": "The bias is added to the affinity when experts are chosen, never to their weight: "
    "it rises for idle experts and sinks for busy ones. Gray: the other experts.",
    "max_vio": "How far the busiest expert of a layer is above the mean load (running mean).",
    "schedule": "Settings that change during the run, as they were at every step.",
    "grad_norm": "Pale: every step; strong: running mean. Clipping tames most spikes; "
    "the highest were skipped (crosses).",
    "tokens_per_s": "Pale: every step; strong: running mean.",
}


def sections(rows: list[dict], run: dict, summary: dict) -> dict[str, str]:
    """Heading → HTML of everything the run has left, in the order of the page."""
    names = run.get("moe_layers") or []

    def plot(key, function, *args):
        keys = {"schedule": training.SCHEDULE_PANELS, "watch": [*rl.RL_PANELS]}.get(key, [key])
        if not any(has(rows, k) for k in keys):
            return ""
        return page.drawing(function(rows, *args), key, CAPTIONS[key])

    before = summary.get("before")
    found = {
        "Reward": plot("reward", rl.plot_rewards, before),
        "Watch": plot("watch", rl.plot_rl_metrics),
        "Loss": "" if has(rows, "reward") else plot("loss", training.plot_loss),
        "Bits per byte": bits_section(rows, summary),
        "Samples": sample_section(summary.get("samples") or []),
        "Expert load": load_section(rows, names),
        "Gate biases": plot("expert_bias", training.plot_expert_bias, names),
        "Balance": plot("max_vio", training.plot_max_vio, names),
        "Schedule": plot("schedule", training.plot_schedule),
        "Gradient norm": plot("grad_norm", training.plot_grad_norm),
        "Speed": plot("tokens_per_s", training.plot_throughput),
        "Settings": settings_section(run),
        "Origin": origin_section(run),
    }
    return {heading: html for heading, html in found.items() if html}


# ── The file ──


def write_report(run_dir) -> Path:
    """Write `report.html` into a finished or running run's directory and return its path."""
    run_dir = Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{run_dir} is no run directory: it holds no metrics.jsonl")
    rows, run = read_metrics(metrics), read_json(run_dir / "run.json")
    summary = read_json(run_dir / "summary.json")
    title = f"Training run {run_dir.resolve().name}"
    html = page.page(title, intro(rows, run, summary), sections(rows, run, summary))
    half, path = run_dir / "report.html.part", run_dir / "report.html"
    half.write_text(html, encoding="utf-8")
    os.replace(half, path)  # a browser that reloads never sees half a page
    return path


def main() -> None:
    """`python -m dsv3_ref.training.report RUN_DIR`."""
    parser = argparse.ArgumentParser(description="Write report.html into a run's directory.")
    parser.add_argument("run_dir", type=Path, help="for example runs/tiny")
    try:
        print(write_report(parser.parse_args().run_dir))
    except UserError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
