"""Files of strangers that expand, loop, or lead elsewhere: each is refused in a moment."""

import bz2
import gzip
import json
import lzma
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chat_forms import FORMS, form_tokenizer

from dsv3_ref.checkpoints.atomic import write_json
from dsv3_ref.checkpoints.manifest import installed_versions, write_manifest
from dsv3_ref.checkpoints.safetensors_files import TensorFiles
from dsv3_ref.config import UserError
from dsv3_ref.data import formats, jinja_template
from dsv3_ref.data.chat_template import ChatTemplate
from dsv3_ref.data.formats import BrokenRow, DataFile, read_rows, read_texts
from dsv3_ref.data.jinja_template import JinjaTemplate
from dsv3_ref.data.shard_writer import Shard
from dsv3_ref.data.shards import read_index
from dsv3_ref.data.tokenizer_settings import TokenizerSettings, copy_files, copy_tokenizer_settings
from dsv3_ref.export.tokenizer_files import copy_tokenizer_files
from dsv3_ref.training.checkpointer import (
    check_same_run,
    monitored_values,
    require_own_checkpoints,
)
from dsv3_ref.training.metrics import ExpertLoadWriter, MetricsWriter
from dsv3_ref.training.report import write_report
from dsv3_ref.training.run_file import read_mapping, read_run_file
from dsv3_ref.training.settings import TrainConfig
from dsv3_ref.training.state import TrainState
from dsv3_ref.viz import training
from dsv3_ref.viz.live import MetricsTail

# ── Chat templates ──

LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a power, when it is compiled": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a power, when it is rendered": "{% set n = messages | length + 8 %}{{ n ** (9 ** (9 ** 9)) }}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a wide text": "{{ 'a' | center(9999999999) }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a text that doubles": "{% set x = namespace(t='ab') %}{% for i in range(40) %}"
    "{% set x.t = x.t ~ x.t %}{% endfor %}",
    "much text": "{% for i in range(99999) %}{{ 'abcdefgh' * 999 }}{% endfor %}",
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


def chat_with(template: str) -> ChatTemplate:
    form = next(iter(FORMS.values()))
    tokens = {"bos_token": form.bos, "eos_token": form.eos}
    settings = TokenizerSettings(tokens, {"default": template}, source="a model")
    return ChatTemplate(form_tokenizer(form), settings)


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_a_template_without_end_is_refused(template, monkeypatch):
    monkeypatch.setattr(jinja_template, "RENDER_SECONDS", 0.3)
    monkeypatch.setattr(jinja_template, "MAX_CHARACTERS", 1 << 20)
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template of a model"):
        chat_with(template).render_prompt([{"role": "user", "content": "a"}])
    assert time.monotonic() - start < 8
    good = chat_with("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert good.render_prompt([{"role": "user", "content": "a"}])


def test_no_conversation_waits_for_the_template_of_a_much_longer_one():
    """V3's template takes seconds for 3 MB of system texts: all others waited for its process."""
    good = chat_with("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    done = threading.Event()

    def ask() -> None:
        good.render_prompt([{"role": "user", "content": "a" * 1000}])
        done.set()

    with jinja_template.shared_renderer(True).lock:  # a long one is being rendered
        threading.Thread(target=ask, daemon=True).start()
        assert done.wait(20)
        done.clear()
    assert good.render_prompt([{"role": "user", "content": "a" * jinja_template.SMALL_QUESTION}])


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'].codecs.open('/etc/hostname').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ ''|map(attribute='__class__')|list }}",
    "{{ {}.__class__.__base__ }}",
    "{% set x = messages.append(1) %}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_nothing(template):
    probe = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + template
    try:
        chat = chat_with(probe)
        text = chat.fill(chat.templates["default"], chat_talk(), False)
    except UserError:
        return
    assert "class" not in text and "function" not in text and text in ("hi", "hi[]", "hi['']")


def chat_talk():
    from dsv3_ref.data.chat_template import Conversation

    return Conversation([{"role": "user", "content": "hi"}], None, {})


def test_a_template_is_parsed_in_its_own_process(monkeypatch):
    """20 MB of expressions would take gigabytes: where there is no limit, nothing is parsed."""
    monkeypatch.setattr(jinja_template, "template_environment", None)
    template = JinjaTemplate("{% generation %}{{ a.b['c'] }}{% endgeneration %}", "a model")
    assert template.names == {"a", "b"}
    assert (template.literals, template.has_generation_blocks) == ({"c"}, True)


def test_a_conversation_of_all_private_characters_is_refused():
    text = "".join(map(chr, range(0xF0000, 0x110000)))
    with pytest.raises(UserError, match="private characters"):
        chat_with("{{ messages[0]['content'] }}").render_prompt([{"role": "user", "content": text}])


# ── Data ──


def compressed(path: Path, suffix: str, data: bytes) -> DataFile:
    """Write compressed data; return the file."""
    import pyarrow as pa

    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
            ".zst": lambda x: pa.compress(x, "zstd", asbytes=True)}[suffix]  # fmt: skip
    path = path / f"data.jsonl{suffix}"
    path.write_bytes(pack(data))
    file = formats.known_file(str(path))
    assert file is not None
    return file


@pytest.mark.parametrize("suffix", formats.COMPRESSIONS)
def test_a_compressed_bomb_is_refused(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(formats, "SMALL_EXPANSION", 1 << 17)
    rows = b'{"text": "a row of data"}\n' * 1000
    assert len(list(read_rows(compressed(tmp_path, suffix, rows)))) == 1000
    for bomb in (rows * 100, b"[" + b" " * (3 << 20)):
        file = compressed(tmp_path, suffix, bomb)
        assert os.path.getsize(file.path) * formats.MAX_EXPANSION < len(bomb)
        for read in (lambda f: read_rows(f), lambda f: read_texts(f, by_paragraph=False)):
            with pytest.raises(UserError, match="expands to more than 200 times"):
                list(read(file))


@pytest.mark.parametrize("suffix", formats.COMPRESSIONS)
def test_a_truncated_file_is_refused(tmp_path, suffix):
    file = compressed(tmp_path, suffix, b'{"text": "a row of data %d"}\n' * 5000)
    path = Path(file.path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot read"):
        list(read_rows(file))


def test_a_row_that_is_nested_deeply_is_left_out(tmp_path):
    """A run of `dsv3 rl` ended with a `RecursionError` while it described its problems."""
    lines = [f'{{"a": {"[" * depth}{"]" * depth}}}' for depth in (99, 100)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines, json.dumps({"a": [[]] * 200})]))
    rows = [row for _, row in read_rows(DataFile(str(path), "json lines"))]
    assert [isinstance(row, BrokenRow) for row in rows] == [False, True, False]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE", 1000)
    for name, text in (
        ("a.jsonl", '{"text": "a"}\n{"text": "' + "b" * 2000 + '"}\n'),
        ("a.csv", 'text,other\na,b\n"' + "c" * 2000 + '",d\n'),
    ):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="line 2 has more than 1,000 bytes"):
        list(read_rows(DataFile(str(tmp_path / "a.jsonl"), "json lines")))
    rows = dict(read_rows(DataFile(str(tmp_path / "a.csv"), "csv")))
    assert "limit" in rows["line 3"].reason
    (tmp_path / "a.json").write_text(json.dumps([{"text": "d" * 3000}] * 2))  # one long line
    assert len(list(read_rows(DataFile(str(tmp_path / "a.json"), "json")))) == 2


def test_a_table_of_many_columns_is_read_in_linear_time(tmp_path):
    names = [f"c{i}" for i in range(200_000)]
    (tmp_path / "a.csv").write_text(",".join([*names, "c0"]) + "\n")
    start = time.process_time()
    with pytest.raises(UserError, match="two columns 'c0'"):
        list(read_rows(DataFile(str(tmp_path / "a.csv"), "csv")))
    assert time.process_time() - start < 5


# ── Options ──


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
def test_a_run_file_without_end_is_refused():
    """It once took all memory."""
    with pytest.raises(UserError, match="/dev/zero is not YAML: it has more than 1048576 char"):
        read_mapping(Path("/dev/zero"))


def test_a_run_file_of_aliases_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines) + "\nlr: *a11\n")
    with pytest.raises(UserError, match="write the value again in the place of") as error:
        read_run_file(path, "train", TrainConfig)
    assert len(str(error.value)) < 500
    path.write_text("steps: &a [*a]\n")
    with pytest.raises(UserError, match="write the value again"):
        read_run_file(path, "train", TrainConfig)


def test_a_named_pipe_is_no_run_file(tmp_path):
    """It was waited for until somebody writes into it."""
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(UserError, match="named pipe"):
        read_mapping(tmp_path / "run.yaml")


# ── Runs of strangers ──


WRITERS = {
    "summary.part": lambda run: write_json(run / "summary.json", {}),
    "report.html.part": write_report,
    "step_0000001.jsonl.gz": lambda run: ExpertLoadWriter(run, 0, 1).write({"step": 1}),
    "tokenizer_config.json": lambda run: copy_tokenizer_settings(run.parent / "base", run),
    "shard-00000.bin.part": lambda run: Shard(run, "shard-00000", 0, "val", np.dtype("<u2")),
}


@pytest.mark.parametrize("name", [*WRITERS, "metrics.jsonl"])
def test_a_link_in_a_run_does_not_overwrite_what_it_leads_to(name, tmp_path):
    """Somebody unpacks a run and resumes it, or writes its report: its links led to ~/.bashrc."""
    run, base = tmp_path / "run", tmp_path / "base"
    mine = tmp_path / "mine"
    run.mkdir()
    base.mkdir()
    (base / "tokenizer_config.json").write_text("{}")
    mine.write_text("mine")
    if name != "metrics.jsonl":
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / name).symlink_to(mine)
    if name == "metrics.jsonl":  # which is continued
        with pytest.raises(UserError, match="metrics.jsonl is a link to .*mine"):
            MetricsWriter(run / name, 0)
    else:
        WRITERS[name](run)
    assert mine.read_text() == "mine"


def test_loads_of_experts_that_expand_without_end_are_read_in_part(tmp_path, monkeypatch):
    """Four megabytes once took six gigabytes, and a pipe was waited for."""
    monkeypatch.setattr(training, "MIN_LOAD_BYTES", 1000)
    monkeypatch.setattr(training, "MAX_ROW", 100)
    row = b'{"step": 1, "expert_load": [[1]]}\n'
    contents = {
        1: gzip.compress(row), 2: gzip.compress(b" " * 200 + row), 3: b"not gzip",
        4: gzip.compress(row) + b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 9,
        5: gzip.compress(b"\n" * 999_999 + row), 6: gzip.compress(b"\xff\n" + row),
    }  # fmt: skip
    for number, content in contents.items():
        (tmp_path / f"step_{number}.jsonl.gz").write_bytes(content)
    os.mkfifo(tmp_path / "step_7.jsonl.gz")
    assert list(training.read_expert_load(tmp_path)) == [json.loads(row)] * 3


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"step": [1]}', '{"step": null}', '{"step": 1e9}']
)
def test_a_row_has_a_step(line):
    assert training.as_row(line) is None


def test_the_step_of_a_checkpoint_may_be_any_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="it lacks the row of step 1000000000000000000"):
        MetricsWriter(path, 10**18)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("change", [{"step": "8"}, {"tokens": None}, {"seconds": []}])
def test_a_state_holds_numbers(change):
    limits = {"skip_grad_norm_factor": 0, "grad_norm_window": 4, "max_skipped_steps": 2}
    state = TrainState(SimpleNamespace(**limits), None, None)
    values = state.state_dict()
    state.load_state_dict(values)
    with pytest.raises(TypeError):  # which `Checkpointer.load` turns into a sentence
        state.load_state_dict(values | change)


@pytest.mark.parametrize(
    "change", [{"fingerprints": 3}, {"fingerprints": {}}, {"fingerprints": {"settings": 1}},
               {"fingerprints": {"settings": {}, "tokenizer": "", "data": [1]}}, {"versions": 3}]
)  # fmt: skip
def test_fingerprints_that_make_no_sense_are_a_sentence(change, tmp_path):
    write_manifest(tmp_path, change)
    now = {"settings": {"lr": 1}, "tokenizer": "", "data": [{"name": "a"}]}
    with pytest.raises(UserError, match="the manifest of .* is damaged"):
        check_same_run({"fingerprints": now}, tmp_path)


def test_missing_fingerprints_are_reported(tmp_path, capsys):
    write_manifest(tmp_path, {"versions": {"torch": installed_versions()["torch"]}})
    assert check_same_run({"fingerprints": {}}, tmp_path)
    assert f"the manifest of {tmp_path} has no fingerprints" in capsys.readouterr().out


@pytest.mark.parametrize("monitored", [
    {}, {"monitored": 3}, {"monitored": {"mode": "min"}},
    {"monitored": {"mode": "min", "value": [1]}}, {"monitored": {"mode": "min", "value": 10**999}},
])  # fmt: skip
def test_a_checkpoint_that_cannot_be_ranked_is_named(monitored, tmp_path):
    (tmp_path / "state.json").write_text(json.dumps(monitored))
    with pytest.raises(UserError, match=rf"{tmp_path}/state.json is damaged"):
        monitored_values([tmp_path])


def test_checkpoints_of_another_run_are_not_pruned(tmp_path):
    mine, evil, disk = (tmp_path / name for name in ("mine", "evil", "disk"))
    for folder in (mine / "checkpoints", evil, disk):
        folder.mkdir(parents=True)
    assert require_own_checkpoints(mine)
    (evil / "checkpoints").symlink_to(disk)
    assert require_own_checkpoints(evil)
    (mine / "run.json").write_text("{}")
    assert require_own_checkpoints(mine)
    (evil / "checkpoints").unlink()
    (evil / "checkpoints").symlink_to(mine / "checkpoints")
    with pytest.raises(UserError, match=f"a link to the checkpoints of another run, {mine}"):
        require_own_checkpoints(evil)


def test_a_part_of_a_model_that_is_a_pipe_is_not_waited_for(tmp_path):
    weight_map = {"embed.weight": "a.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="a.safetensors is damaged .*not a regular file"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_metrics_without_end_are_not_waited_for(kind, tmp_path):
    path = tmp_path / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert MetricsTail(tmp_path).read() == []


# ── Links, and names of files ──


@pytest.fixture
def model(tmp_path):
    """A folder with the tokenizer files of a model, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    return folder


COPIES = {"for a run": copy_tokenizer_settings, "for an export": copy_tokenizer_files}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_link_does_not_publish_what_it_leads_to(model, copy):
    """A downloaded model links to a key of the user, who exports and uploads a tuned model."""
    out = model.parent / "out"
    templates = model / "additional_chat_templates"
    (templates / "all").symlink_to("/")
    (templates / "pipe.jinja").symlink_to("/dev/zero")
    copy(model, out)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    folder = "additional_chat_templates"
    assert names == [folder, f"{folder}/tool_use.jinja", "tokenizer_config.json"]
    for link in (model / "chat_template.jinja", templates / "key.jinja"):
        link.symlink_to("../secret" if link.parent == model else "../../secret")
        with pytest.raises(UserError, match="outside of the model"):
            copy(model, out)
        link.unlink()
    assert "secret" not in "".join(p.read_text() for p in out.rglob("*") if p.is_file())
    (model / "chat_template.jinja").symlink_to("tokenizer_config.json")  # inside
    copy(model, out)
    assert (out / "chat_template.jinja").read_text() == "{}"


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "1a2b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "c3").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/c3")
    (tmp_path / "out").mkdir()
    copy_files(snapshot, tmp_path / "out", ["tokenizer_config.json"])
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


ENTRY = {
    "name": "shard-00000", "documents": 1, "tokens": 1, "bytes": 2,
    "sha256": {"bin": "", "npy": "", "sum": ""},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/passwd"}, {"name": "/dev/zero"}, {"name": "shard-0/../.."},
        {"name": 5}, {"documents": -17}, {"bytes": "2"}, {"tokens": 1.5}, {"sha256": {}},
        {"sha256": {"bin": "", "npy": 0, "sum": ""}},
    ],
)  # fmt: skip
def test_an_index_of_shards_names_its_own_files(tmp_path, change):
    index = {"format": 1, "dtype": "<u2", "shards": [ENTRY | change]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is damaged"):
        read_index(tmp_path)


@pytest.mark.parametrize("dtype", ["O", "V8", "<f4", "(9999999,)u8", "u2,u2", 5, ["x"]])
def test_shards_hold_numbers(tmp_path, dtype):
    index = {"format": 1, "dtype": dtype, "shards": []}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is damaged"):
        read_index(tmp_path)
