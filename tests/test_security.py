"""A pickle in place of any file that a command reads is never loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from miniruns import MINI
from safetensors.torch import save_file
from support import randomize

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import save
from dsv3_ref.config import from_dict
from dsv3_ref.data import prepare
from dsv3_ref.data.tokenizer import save_tokenizer, train_tokenizer
from dsv3_ref.model import Transformer

TRIALS = """
import builtins, json, pickle, shutil, sys
from pathlib import Path

armed, loaded = False, []

def audit(event, args):
    if armed and event in ("pickle.find_class", "marshal.loads") and args and args[0] == "shutil":
        loaded.append(args)

sys.addaudithook(audit)

class Attack:
    def __reduce__(self):
        return shutil.copyfile, (sys.argv[0] or "/dev/null", "owned")

Path("proof").write_bytes(pickle.dumps(Attack()))
armed = True
try:
    pickle.loads(Path("proof").read_bytes())
except OSError:
    pass
assert loaded, "the hook sees a pickle that is loaded"
loaded.clear()
attack = Path("proof").read_bytes()

from dsv3_ref.cli.main import run

for argv, name in json.load(open("trials.json")):
    path = Path(name)
    content = path.read_bytes() if path.exists() else None
    path.write_bytes(attack)
    code = run(argv)
    print(json.dumps([argv[0], name, code, [str(x) for x in loaded], Path("owned").exists()]))
    loaded.clear()
    path.unlink() if content is None else path.write_bytes(content)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, the same for transformers, a run, shards and files of rows, all tiny."""
    folder = tmp_path_factory.mktemp("home")
    texts = [f"Document {i} is about {i * i} and other numbers." for i in range(40)]
    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, 300)
    model = randomize(Transformer(from_dict(MINI)))
    for name in ("ours", "theirs", "run"):
        save_tokenizer(tokenizer, folder / name / "tokenizer.json")
    save(model, folder / "ours" / "checkpoints" / "step_0000001")
    save_hf(model, folder / "hf", shard_bytes=100_000)
    save_tokenizer(tokenizer, folder / "hf" / "tokenizer.json")
    prepare.prepare_shards(
        prepare.PrepareConfig(
            folder / "shards", (str(folder / "text"),), tokenizer=folder / "hf", dedup=0,
            workers=1,
        )
    )  # fmt: skip
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "mini.json").write_text(json.dumps(MINI))
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    return folder


def trials(home: Path) -> list[tuple[list[str], str]]:
    """Return (command line, file that is replaced by a pickle)."""
    step = "ours/checkpoints/step_0000001"
    fixed = "--config mini.json --steps 1 --seq-len 32 --global-batch-size 2 --out run1".split()
    out: list[tuple[list[str], str]] = []
    for file in ("config.json", "model.safetensors", "manifest.json", ".metadata", "tensors.json"):
        for more in ([], ["--no-verify"]):
            out.append((["generate", "ours", "x", *more], f"{step}/{file}"))
        out.append((["check", "ours"], f"{step}/{file}"))
    index = "hf/model.safetensors.index.json"
    weights = str(min(home.glob("hf/*.safetensors")).relative_to(home))
    for file in ("hf/config.json", index, "hf/tokenizer.json", "hf/pytorch_model.bin", weights):
        out.append((["generate", "hf", "x"], file))
    for file in (
        "index.json",
        "tokenizer.json",
        "shard-00001.bin",
        "shard-00001.npy",
        "shard-00001.sum",
    ):
        out.append((["train", *fixed, "--data", "shards"], f"shards/{file}"))
        out.append((["check", "shards"], f"shards/{file}"))
    for name in ("data.txt", "data.jsonl", "data.json", "data.parquet"):
        out.append((["train", *fixed, "--data", name], name))
        out.append(
            (["sft", "--init", "hf", "--seq-len", "32", "--out", "sft1", "--data", name], name)
        )
        out.append(
            (["reward", "--init", "hf", "--seq-len", "32", "--out", "rm1", "--data", name], name)
        )
    out.append((["train", *fixed, "--tokenizer", "tok"], "tok"))
    out.append((["train", "--config", "shape.json"], "shape.json"))
    for file in ("run.json", "metrics.jsonl", "tokenizer.json"):
        out.append((["train", "--resume", "--out", "run"], f"run/{file}"))
    return out


def test_a_pickle_is_never_loaded(home):
    planned = trials(home)
    (home / "trials.json").write_text(json.dumps(planned))
    done = subprocess.run(
        [sys.executable, "-c", TRIALS], cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    results = [json.loads(line) for line in lines]
    assert len(results) == len(planned)
    for command, name, code, loaded, owned in results:
        assert not loaded and not owned, (command, name)
        ignored = name.endswith((".metadata", "pytorch_model.bin"))
        assert (code == 0) == ignored or code in (0, 2), (command, name, code)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
