"""Models of the Hugging Face Hub by name: what is downloaded, and what is said if it fails.

The download itself is replaced: a stand-in of `snapshot_download` copies what its patterns allow.
"""

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from support import randomize
from tokenizers import Tokenizer, models

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import find_tokenizer_dir, load, load_checkpoint_config
from dsv3_ref.cli.main import main
from dsv3_ref.config import UserError
from dsv3_ref.model import Transformer

OTHER_FILES = (
    "modeling_deepseek.py", "pytorch_model.bin", "training_args.bin", "consolidated.00.pth",
    "optimizer.pt", "model.gguf", "tokenizer.json", "tokenizer_config.json", "figures/a.png",
)  # fmt: skip


class Hub:
    """A stand-in of the hub with one model; `calls` are the arguments of each download."""

    def __init__(self, files: Path, cache: Path):
        self.files, self.cache = files, cache
        self.calls: list[tuple[str, str | None]] = []

    def snapshot_download(self, repo: str, revision=None, allow_patterns=()) -> str:
        """Copy the files that a pattern allows, as the real function does."""
        self.calls.append((repo, revision))
        for path in (p for p in self.files.rglob("*") if p.is_file()):
            name = path.relative_to(self.files)
            if any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.cache / name)
        return str(self.cache)


@pytest.fixture
def hub(micro, tmp_path, monkeypatch):
    save_hf(randomize(Transformer(micro)), tmp_path / "files", shard_bytes=60_000)
    for name in OTHER_FILES:
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text("{}")
    (tmp_path / "files/tokenizer.json").write_text(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    stand_in = Hub(tmp_path / "files", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr("dsv3_ref.checkpoints.hub.hub_answers", lambda: True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return stand_in


@pytest.mark.parametrize("path", [str, Path], ids=["text", "path"])
def test_a_model_by_its_name(path, hub):
    ours = load(hub.files).head.weight
    assert torch.equal(load(path("deepseek-ai/DeepSeek-V2.5")).head.weight, ours)
    assert load_checkpoint_config(path("deepseek-ai/DeepSeek-V2.5")).dim == 24
    assert find_tokenizer_dir(Path("deepseek-ai/DeepSeek-V2.5")) == hub.cache
    assert set(hub.calls) == {("deepseek-ai/DeepSeek-V2.5", None)}


def test_neither_code_nor_pickles_are_downloaded(hub):
    load("owner/model")
    names = {p.name for p in hub.cache.rglob("*") if p.is_file()}
    assert {n for n in names if not n.endswith(".safetensors")} == {
        "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_a_revision(hub):
    load("owner/model@refs/pr/3")
    assert hub.calls == [("owner/model", "refs/pr/3")]


def test_an_incomplete_download_is_named(hub):
    min(hub.files.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="model-00001-of-.*is named in .*index.json but is not"):
        load("owner/model")


NOT_LOOKED_UP = {
    "a run with a typing mistake": "runs/tinny",
    "a path inside a run": "runs/a/checkpoints",
    "an absolute path": "/nix/model",
    "the folder above": "../model",
    "a single word": "model",
    "a folder that is there": "models/mine",
}


@pytest.mark.parametrize("path", NOT_LOOKED_UP.values(), ids=NOT_LOOKED_UP)
def test_paths_are_not_names(path, hub):
    Path("models").mkdir()
    with pytest.raises(UserError, match="there is no directory .*check the path"):
        load(path)
    assert not hub.calls


def not_found() -> Exception:
    class Response:
        headers: dict = {}
        request = None
        status_code = 404

    return RepositoryNotFoundError("401 Client Error.\n\nRepository Not Found", response=Response())


FAILURES = {
    "offline": (lambda: LocalEntryNotFoundError("no snapshot"), "Hub cannot be reached"),
    "gated, private or misspelled": (not_found, r"not have it for you \(401 .*hf auth login"),
    "no permission for the cache": (lambda: PermissionError(13, "denied"), "denied"),
    "a full disk": (lambda: OSError(28, "No space left on device"), "No space left"),
}


@pytest.mark.parametrize(("error", "words"), FAILURES.values(), ids=FAILURES)
def test_a_failed_download_is_one_sentence(error, words, hub, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"there is no directory owner/model.*{words}"):
        load("owner/model")
    assert main(["export", "owner/model", "out"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_offline_mode_of_the_client(micro, tmp_path, monkeypatch):
    """HF_HUB_OFFLINE=1 with an empty cache, and the real client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="owner/model, and the Hugging Face Hub cannot be reached"):
        load("owner/model")


# ── Out ──


class Api:
    """A stand-in of `HfApi` that keeps what it is told."""

    calls: list = []
    error: Exception | None = None

    def create_repo(self, repo, private, exist_ok):
        assert private and exist_ok
        if self.error:
            raise self.error
        self.calls.append(repo)

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


def test_push(hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    assert main(["export", str(hub.files), "out", "--push", "me/tiny"]) == 0
    assert Api.calls == [("me/tiny"), ("me/tiny", sorted(p.name for p in Path("out").iterdir()))]
    assert "pushed to https://huggingface.co/me/tiny" in capsys.readouterr().out


def test_a_failed_push_keeps_the_directory(hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "error", not_found())
    assert main(["export", str(hub.files), "out", "--push", "me/tiny"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "--push me/tiny failed (401 Client Error" in error
    assert "hf upload me/tiny out" in error
    assert load("out")


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/tiny@main", "https://huggingface.co/me/x"])
def test_a_wrong_name_is_refused_before_the_export(name, hub, capsys):
    assert main(["export", str(hub.files), "out", "--push", name]) == 2
    assert f"--push {name}: a repository is called owner/name" in capsys.readouterr().err
    assert not Path("out").exists()
