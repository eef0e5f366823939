"""A run as a file: `--config FILE` for every command, replays of run.json, damaged run files."""

import json
import shutil
import subprocess
from itertools import product
from pathlib import Path

import miniruns
import pytest
import tyro
import yaml
from miniruns import metrics, no_report, options

import dsv3_ref
from dsv3_ref.cli.main import main
from dsv3_ref.training import run_file, settings

SHORT = ["--steps", "2", "--save-every", "2"]


pytestmark = pytest.mark.usefixtures("without_reports")


@pytest.fixture(scope="module")
def finished(home):
    """A run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3_ref.training.report.write_report", no_report)
        assert main(options(home, home / "finished", *SHORT)) == 0
    return home / "finished"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


# ── Replays ──


def test_a_run_is_repeated_from_its_own_file(home, finished, tmp_path):
    """Somebody sends a colleague run.json and asks for the same numbers."""
    again = tmp_path / "again"
    file = shutil.copy(finished / "run.json", tmp_path / "mail.json")
    assert main(["train", "--config", str(file), "--out", str(again)]) == 0
    assert losses(again) == losses(finished)
    first, second = (json.loads((run / "run.json").read_text()) for run in (finished, again))
    assert second["settings"] == first["settings"] | {"out": str(again)}
    assert second["model"] == first["model"]


def test_a_run_file_in_yaml_is_the_command_line(home, finished, tmp_path):
    """Options as people write them: dashes or underscores, 1e-3, a list, the recipe's beside."""
    before = json.loads((finished / "run.json").read_text())["settings"]
    path = tmp_path / "run.yaml"
    path.write_text(
        f"config: {home}/mini.json\ndata: {home}/text\nsteps: 2\nseq-len: 32\n"
        "global_batch_size: 4\nwarmup_steps: 2\nsave_every: 2\nmodel.n_heads: 2\n"
        f"lr: {before['recipe']['lr']:.6e}\nrecipe: {{beta1: 0.9}}\n"
    )
    assert main(["train", f"--config={path}", "--out", str(tmp_path / "a")]) == 0
    assert losses(tmp_path / "a") == losses(finished)


def test_the_command_line_overrides_the_file(home, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"config: {home}/mini.json\nseed: 1\nlr: 1e-3\ndata: [a, b]\nmodel: {{dim: 32}}\n"
    )
    args = settings.parse_args(["--config", str(path), "--seed", "2", "--data", "c"])
    assert (args.seed, args.recipe.lr, args.data) == (2, 1e-3, ("c",))
    assert (args.model.dim, args.model.vocab_size) == (32, miniruns.MINI["vocab_size"])
    assert args.config == f"{home}/mini.json"


def test_a_run_file_and_resume(home, tmp_path, capsys):
    """The same command again with --resume, as a scheduler's script has it."""
    path = tmp_path / "run.yaml"
    given = {"config": f"{home}/mini.json", "data": [f"{home}/text"], "out": f"{tmp_path}/run"}
    path.write_text(yaml.safe_dump(given | {"steps": 2, "seq_len": 32, "global_batch_size": 4}))
    assert main(["train", "--config", str(path)]) == 0
    assert main(["train", "--config", str(path), "--resume"]) == 0
    path.write_text(path.read_text().replace("steps: 2", "steps: 3"))
    assert main(["train", "--config", str(path), "--resume"]) == 2
    assert "was started with --steps 2, not 3" in capsys.readouterr().err


@pytest.fixture
def parse(monkeypatch):
    """The options that a command line gives; the command does not run."""

    def stop(*args, **kwargs):
        parsed.append(parse_with_tyro(*args, **kwargs))
        raise SystemExit(0)

    def parse(*argv):
        assert main([str(x) for x in argv]) == 0
        return parsed.pop()

    parsed, parse_with_tyro = [], tyro.cli
    monkeypatch.setattr(tyro, "cli", stop)
    return parse


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("generate", "model: m\nprompt: [a, b]\ntemperature: 0\n", "prompt", ("a", "b")),
        ("chat", '{"model": "m", "max-new-tokens": 7}', "max_new_tokens", 7),
        ("serve", "model: m\nport: 8001\n", "port", 8001),
        ("eval", "model: m\ntasks: sums\n", "tasks", ("sums",)),
        ("plan", "config: v3\nrates: {memory: 70}\n", "config", "v3"),
        ("plan", "rates.memory: 70\npp: 4\n", "pp", 4),
        ("data prepare", "out: shards\nworkers: 1\n", "out", Path("shards")),
        ("bench", "parts: [train]\n", "parts", ("train",)),
        ("ablate", "name: mtp\nseeds: 1\n", "seeds", 1),
        ("check", "folder: f\n", "folder", Path("f")),
        ("sft", "epochs: 2\nema-decay: .9\n", "epochs", 2.0),
        ("extend", "phase: 128k\ninit: null\nconfig: tiny\n", "phase", "128k"),
        ("rl", "num_generations: 4\nlr: 1e-5\n", "num_generations", 4),
    ],
    ids=lambda x: str(x).split(":")[0],
)
def test_every_command_reads_its_options_from_a_file(name, text, field, value, tmp_path, parse):
    path = tmp_path / ("run.json" if text.startswith("{") else "run.yml")
    path.write_text(text)
    assert getattr(parse(*name.split(), "--config", path), field) == value


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("train", "stepz: 3", "run.yaml: there is no option 'stepz' (did you mean steps?)"),
        ("train", "model: {n_headz: 3}", "no option 'n_headz' (did you mean n_heads"),
        # unslothai/unsloth #10452: what stands in the wrong place was dropped
        ("train", "model: {lr: 1e-3}", "run.yaml: model: there is no option 'lr'"),
        ("train", "model: {dim: wide}", "run.yaml: model: dim must be a whole number"),
        ("train", "steps: ten", "run.yaml: steps must be a whole number, not 'ten'"),
        ("train", "steps: 2.5", "steps must be a whole number, not 2.5"),
        ("train", "steps: true", "steps must be a whole number, not True"),
        ("train", "lr: fast", "lr must be a number, not 'fast'"),
        ("train", "zero: 1", "zero must be true or false, not 1"),
        ("train", "config: 3\nsteps: 1", "config must be a string (quote it), not 3"),
        ("train", "init: [a]", "init must be a path, as a string, not ['a']"),
        ("train", "precision: fp4", "precision must be one of auto, fp32, bf16, fp8, not 'fp4'"),
        ("train", "model: tiny\nsteps: 1", "model must be a mapping of options, not 'tiny'"),
        ("train", "recipe: 3\nsteps: 1", "recipe must be a mapping of options, not 3"),
        ("train", "data: [1]", "data must be a string (quote it), not 1"),
        ("train", "3: x", "the name of an option must be a string, not 3"),
        ("train", "[steps, 3]", "run.yaml must hold options by name, not a list"),
        ("train", "", "run.yaml has no options: write one per line"),
        ("train", "# nothing yet\n", "run.yaml has no options: write one per line"),
        ("train", "3", "run.yaml must hold options by name, not a number"),
        ("train", "steps:", "run.yaml: steps must be a whole number, not an empty value"),
        ("train", "model:\nsteps: 1", "model must be a mapping of options, not an empty value"),
        ("train", "steps: [", "run.yaml is not YAML: while parsing a flow node"),
        ("train", "steps: !!python/object:os.x {}", "run.yaml is not YAML: could not determine"),
        ("train", '{"name": "sft", "settings": {}}', "dsv3 sft --config"),
        ("train", "steps: 0", "--steps must be at least 1"),
        ("generate", "prompt: x\ntemprature: 1", "did you mean temperature?"),
        ("plan", "rates: {hbn: 1}", "there is no option 'hbn'"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_a_mistake_in_a_run_file_is_a_sentence(name, text, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    assert main([*name.split(), "--config", "run.yaml"]) == 2
    assert sentence in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["run.yaml"]


def test_a_run_file_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("latin.yaml").write_bytes(b"system: caf\xe9")
    Path("deep.json").write_text("[" * 100_000)
    for name, path in (("chat", "missing.yaml"), ("chat", "latin.yaml"), ("train", "deep.json")):
        assert main([name, "--config", path]) == 2
        assert path in capsys.readouterr().err


# ── Records ──


def test_a_run_records_the_program_that_made_it(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["name"] == "train" and record["version"] == dsv3_ref.__version__
    assert (record["commit"], record["dirty"]) == run_file.git_state()


@pytest.mark.parametrize("state", ["clean", "dirty", "no repository", "no git"])
def test_the_state_of_the_checkout(state, tmp_path, monkeypatch):
    """An installed wheel has no commit; a machine may lack git; an edit makes the commit untrue."""
    module = tmp_path / "dsv3_ref" / "training" / "run_file.py"
    module.parent.mkdir(parents=True)
    module.write_text("1")
    monkeypatch.setattr(run_file, "__file__", str(module))
    if state != "no repository":
        for words in ("init", "add .", "-c user.name=x -c user.email=x commit -m x"):
            subprocess.run(["git", "-C", str(tmp_path), *words.split()], check=True)
    if state == "dirty":
        module.write_text("2")
    if state == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    commit, dirty = run_file.git_state()
    assert (len(commit or ""), dirty) == {
        "clean": (40, False), "dirty": (40, True), "no repository": (0, None), "no git": (0, None),
    }[state]  # fmt: skip


# ── Damaged run files ──

JUNK = [None, True, -1, 1e99, "", "junk", [], ["a", 1], {}, {"a": {}}]


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values in nested JSON that are neither an object nor a list."""
    if not isinstance(value, dict | list) or not value:
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    paths = []
    for key, inner in items:
        paths += leaves(inner, (*path, key))
    return paths


def changed(record: dict, path: tuple, junk: object) -> dict:
    """Return a copy of nested JSON with another value at a path."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    return copy


def check_resume(run: Path, record: dict, capsys) -> None:
    """Expect that a run with this run.json resumes, or that a sentence says why not."""
    (run / "run.json").write_text(json.dumps(record))
    code = main(["train", "--resume", "--out", str(run)])
    err = capsys.readouterr().err
    assert code == 0 or (code == 2 and "error: " in err), err


def fuzz(finished: Path, tmp_path: Path, capsys, stride: int) -> None:
    """Replace every leaf of run.json by junk, every `stride`-th pair of them."""
    run = shutil.copytree(finished, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    pairs = list(product(leaves(record), JUNK))
    for path, junk in pairs[::stride]:
        check_resume(run, changed(record, path, junk), capsys)


def test_junk_in_run_json_never_ends_in_a_traceback(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dsv3_ref.training.loop.train", lambda *_: None)
    fuzz(finished, tmp_path, capsys, stride=23)


@pytest.mark.full
def test_junk_in_run_json_and_a_whole_resumed_run(finished, tmp_path, capsys):
    fuzz(finished, tmp_path, capsys, stride=5)
