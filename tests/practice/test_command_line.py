"""Pipes, terminals, keyboards and encodings around a command."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import miniruns
import pytest
from miniruns import metrics, options

from dsv3_ref.cli import environment
from dsv3_ref.cli.main import expand_home, main
from dsv3_ref.config import UserError
from dsv3_ref.data.progress import ProgressBar
from dsv3_ref.serving import generate
from dsv3_ref.serving.config import GenerateConfig
from dsv3_ref.training import loop
from dsv3_ref.training.report import write_report

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("without_reports")

# ── Progress ──


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "returns"),
    [(io.StringIO, "xterm", 0), (Terminal, "dumb", 0), (Terminal, "xterm", 1)],
    ids=["file", "TERM=dumb", "terminal"],
)
def test_progress_is_lines_where_there_is_no_terminal(stream, term, returns, monkeypatch):
    """Logs of a batch job with thousands of carriage returns in one line."""
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", term)
    with ProgressBar(total=50, unit="step", file=sys.stderr) as bar:
        for _ in range(50):
            bar.update(1)
    text = sys.stderr.getvalue()
    assert bool(text.count("\r")) == bool(returns)
    assert "50/50" in text.splitlines()[-1]
    if not returns:
        assert len(text.splitlines()) == 1 and "█" not in text and "\033" not in text


ASK_FOR_COLORS = """
import os, pty, sys
pid, terminal = pty.fork()
if not pid:
    os.execv(sys.executable, [sys.executable, "-m", "dsv3_ref", *sys.argv[1:]])
text = b""
try:
    while part := os.read(terminal, 1 << 16):
        text += part
except OSError:
    pass
sys.stdout.buffer.write(text)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--stepz", "3"], ["--help"],
        pytest.param(["check", "--help"], marks=pytest.mark.full),
        pytest.param(["eval", "--limit", "x"], marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_no_color_is_honored(argv):
    """https://no-color.org; colbymchenry/codegraph #1281 is such a report."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    env = {k: v for k, v in env.items() if k not in ("NO_COLOR", "PYTHON_TYRO_ANSI_CODES")}

    def colors(**more: str) -> bool:
        command = [sys.executable, "-c", ASK_FOR_COLORS, *argv]
        shown = subprocess.run(command, env=env | more, capture_output=True).stdout
        assert len(shown) > 80
        return b"\033[" in shown

    assert not colors(NO_COLOR="1")
    assert colors(NO_COLOR="") is (argv != ["--help"])  # an empty one counts as unset


# ── Ctrl-C ──


def press(times: int, take_step):
    """`take_step` that presses Ctrl-C in the second step."""

    def pressing(run):
        row = take_step(run)
        for _ in range(times if run.state.step == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return row

    return pressing


@pytest.mark.parametrize(("times", "checkpoints"), [(1, ["step_0000002"]), (2, [])])
def test_ctrl_c_saves_and_a_second_one_does_not(
    times, checkpoints, home, tmp_path, monkeypatch, capfd
):
    """Hours of training lost by Ctrl-C, or a Ctrl-C that does not end it."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "take_step", press(times, loop.take_step))
    run = tmp_path / "run"
    assert main(options(home, run)) == 130
    err = capfd.readouterr().err
    assert "Ctrl-C again stops at once" in err
    assert f"dsv3 train --resume --out {run}" in err
    assert [x.name for x in run.glob("checkpoints/*")] == checkpoints
    assert signal.getsignal(signal.SIGINT) == before
    if checkpoints:
        monkeypatch.setattr(loop, "take_step", loop.take_step.__closure__[0].cell_contents)
        assert main(["train", "--resume", "--out", str(run)]) == 0
        assert len(metrics(run)) == miniruns.STEPS


# ── Chat ──


class Talk:
    """A generator whose answer to a line is the line, except for some."""

    def encode(self, turns):
        text = turns[-1]
        if "long" in text:
            raise UserError("the prompt has 9 tokens, but the model reads at most 8: shorten it")
        return text

    def iter_text(self, prompts):
        for word in prompts[0].split():
            if word == "^C":
                raise KeyboardInterrupt
            yield (word + " ",)


@pytest.fixture
def chat(monkeypatch, capsys):
    """(exit code, stdout, stderr) of a chat with these lines."""

    def run(lines: str, terminal: bool = True):
        stdin = (Terminal if terminal else io.StringIO)(lines)
        monkeypatch.setattr(sys, "stdin", stdin)
        code = 0
        try:
            generate.chat_loop(Talk())
        except SystemExit as e:
            code = e.code
        out = capsys.readouterr()
        return code, out.out, out.err

    monkeypatch.setattr(generate, "question", lambda line: line)
    monkeypatch.setattr(generate, "fit_history", lambda talk, turns: talk.encode(turns))
    monkeypatch.setattr(generate, "answered", lambda turn, answer: turn)
    return run


def test_one_bad_line_does_not_end_a_chat(chat):
    """Somebody pastes a whole file into the prompt."""
    code, out, err = chat("a\na long line\nb\n")
    assert (code, err.count("error: the prompt has 9 tokens")) == (0, 1)
    assert "a \n" in out and "b \n" in out
    assert chat("a long line\nb\n", terminal=False)[0] == 2


def test_the_end_of_the_input_ends_a_chat(chat):
    assert chat("") == (0, "> ", "")
    assert chat("", terminal=False) == (0, "", "")


def test_ctrl_c_ends_an_answer_and_not_the_chat(chat):
    code, out, _ = chat("one ^C two\nthree\n")
    assert code == 0 and "one  …\n" in out and "three \n" in out and "two" not in out


PRESS_UP = """
import os, pty, sys, time
pid, terminal = pty.fork()
if not pid:
    from dsv3_ref.serving import generate
    generate.enable_line_editing()
    for _ in range(2):
        print("<" + generate.read_line() + ">", flush=True)
    os._exit(0)
text = b""
for keys in (b"hello\\r", b"\\x1b[A\\x1b[D!\\r"):
    while not text.endswith(b"> "):
        text += os.read(terminal, 1 << 10)
    os.write(terminal, keys)
    text += b"."
try:
    while part := os.read(terminal, 1 << 10):
        text += part
except OSError:
    pass
sys.stdout.buffer.write(text)
"""


def test_arrow_keys_edit_a_line_and_recall_earlier_ones():
    """JustVugg/colibri #922: they were printed as ^[[A and ^[[D."""
    pytest.importorskip("readline")
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    shown = subprocess.run(
        [sys.executable, "-c", PRESS_UP], env=env, capture_output=True, timeout=60
    )
    assert b"<hello>" in shown.stdout and b"<hell!o>" in shown.stdout


# ── Text, names and folders ──


ODD_NAMES = ["a b'[1]%s*?é", "-x", "a\nb", "$(x)", "ü" * 40]


@pytest.mark.parametrize(
    "name",
    ["-".join(["", *ODD_NAMES]), *[pytest.param(n, marks=pytest.mark.full) for n in ODD_NAMES]],
)
def test_odd_names_of_a_run(name, home, tmp_path):
    """Spaces, brackets, quotes, a leading dash: the names that people give folders."""
    assert main(options(home, f"{tmp_path}/{name}", "--steps", "1")) == 0
    assert [x.name for x in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("form", [["--out=~/run"], ["--out", "~/run"]])
def test_a_tilde_is_the_home_directory(form, home, tmp_path, monkeypatch):
    """hashicorp/terraform #15541, openshift/installer #1821: a folder called ~ appeared."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    argv = options(home, "OUT", "--steps", "1")
    i = argv.index("--out")
    assert main([*argv[:i], *argv[i + 2 :], *form]) == 0
    assert (tmp_path / "me" / "run" / "run.json").is_file()
    assert not list((tmp_path / "here").iterdir())
    assert main(["check", "--help"]) == 0


def test_a_tilde_in_a_text_stays(tmp_path):
    argv = ["~", "--prompt=~/a", "--prompt", "~/b", "--no-verify"]
    assert expand_home(argv, GenerateConfig) == argv


def test_a_name_that_is_not_utf8_and_its_report(home, tmp_path):
    """`UnicodeEncodeError: surrogates not allowed` after a run in such a folder."""
    run = tmp_path / "r\udcff"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3_ref.training.report.write_report", write_report)
        assert main(options(home, run, "--steps", "1")) == 0
    assert "r\\udcff" in (run / "report.html").read_text()


def test_text_that_cannot_be_written_is_a_sentence(monkeypatch, capsys):
    def run(*_):
        "\udcff".encode()

    monkeypatch.setattr("dsv3_ref.cli.main.run_command", run)
    assert main(["generate", "x"]) == 2
    assert "bytes that are not UTF-8 ('\\udcff')" in capsys.readouterr().err


@pytest.mark.parametrize("home_dir", ["/proc/none", "/dev/null", ""])
def test_caches_where_home_cannot_be_written_to(home_dir, monkeypatch):
    """Containers run as a user without a home: `PermissionError: '/.cache'`."""
    for name in ("HF_HOME", "DSV3_CACHE", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", home_dir)
    with environment.writable_caches():
        used = os.environ.get("DSV3_CACHE")
        if home_dir:
            assert used and environment.is_writable(Path(used))
        else:  # the user's own directory, by the user database
            assert "HOME" not in os.environ
    assert not used or not Path(used).parent.exists()


def test_a_deleted_current_directory_is_a_sentence(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    done = subprocess.run(
        f"rmdir {folder}; exec {sys.executable} -m dsv3_ref --help",
        shell=True, cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: the current directory has been deleted: change to another one\n"


def test_a_folder_that_cannot_be_created_names_the_option(home, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(options(home, tmp_path / "file" / "run")) == 2
    assert "cannot be used (Not a directory): choose another --out" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_a_run_quietly(home, tmp_path, monkeypatch, capsys):
    """`dsv3 train | head -1`: the next print fails with EPIPE."""

    def leave(*_):
        raise BrokenPipeError

    monkeypatch.setattr(loop, "write_results", leave)
    assert main(options(home, tmp_path / "run", "--steps", "1")) == environment.BROKEN_PIPE
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["20", "0", "x"])
def test_help_in_a_narrow_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["check", "--help"]) == 0
    assert "--help" in "".join(capsys.readouterr().out.split())


def test_a_python_that_strips_docstrings_runs_commands(tmp_path):
    """huggingface/transformers pull request #29689: python -OO leaves no docstrings."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = "import sys; from dsv3_ref.cli.main import main; main(sys.argv[1:])"
    code += "; print('and', file=sys.stderr); main(sys.argv[1:2] + ['--help'])"
    command = [sys.executable, "-OO", "-c", code, "check", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    mistake, _ = done.stderr.split("and\n")
    assert mistake and "--help" in done.stdout
