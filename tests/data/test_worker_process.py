"""A process that answers lines: limits, an end before the answer, and processes that fork."""

import os
import signal
import time

import pytest

from dsv3_ref.config import UserError
from dsv3_ref.data import worker_process
from dsv3_ref.data.worker_process import WorkerProcess

MEMORY = 1 << 28
ANSWERS = f"""
import os, signal, time
from dsv3_ref.data.worker_process import answer_lines

def answer(line):
    command, _, argument = line.strip().partition(" ")
    if command == "sleep":
        time.sleep(float(argument))
    if command == "allocate":
        return str(len(bytes(int(argument))))
    if command == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if command == "die":
        os._exit(0)
    if command == "alarm":
        return str(signal.alarm(60))
    return command + " " + str(os.getpid())

answer_lines(answer, {MEMORY})
"""


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Return a worker of a module that is found through PYTHONPATH."""
    (tmp_path / "answers.py").write_text(ANSWERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = WorkerProcess("answers", "the process of answers cannot start")
    worker.ensure_started()
    yield worker
    if worker.process is not None:
        worker.stop()


def test_the_current_directory_is_not_imported(answers, tmp_path, monkeypatch):
    """Somebody runs `dsv3 chat .` in a directory that they have downloaded."""
    stranger = tmp_path / "model"
    stranger.mkdir()
    for name in ("random", "queue", "signal", "dsv3_ref"):
        (stranger / f"{name}.py").write_text("raise SystemExit('code of a stranger')")
    monkeypatch.chdir(stranger)
    answers.stop()
    assert pid_of(answers)


def pid_of(worker: WorkerProcess) -> int:
    worker.ensure_started()
    return int(worker.ask("pid", 30).split()[1])


def test_one_process_answers_all_lines(answers):
    first = pid_of(answers)
    assert first == answers.process.pid != os.getpid()
    assert [pid_of(answers), pid_of(answers)] == [first, first]
    assert answers.ask("é ü", 30) == f"é {first}"


def test_a_late_answer_ends_the_process_and_the_next_has_another(answers):
    first, process = pid_of(answers), answers.process
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        answers.ask("sleep 60", 0.2)
    assert 0.2 <= time.monotonic() - start < 30
    assert answers.process is None and process.returncode == -signal.SIGKILL
    assert process.stdin.closed
    assert pid_of(answers) != first


def test_so_does_an_end_before_the_answer(answers):
    first = pid_of(answers)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        answers.ask("die", 60)
    assert time.monotonic() - start < 30 and answers.process is None
    assert pid_of(answers) != first
    answers.process.kill()
    answers.process.wait()
    with pytest.raises(TimeoutError):
        answers.ask("pid", 60)
    assert answers.process is None


def test_a_process_that_was_killed_is_replaced_before_it_is_asked(answers):
    first = pid_of(answers)
    answers.process.kill()
    answers.process.wait()
    answers.process.stdin.close()
    assert pid_of(answers) != first


def test_a_forked_process_has_a_worker_of_its_own(answers):
    first = pid_of(answers)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, str(pid_of(answers)).encode())
            answers.stop()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reader, 20)) not in (first, child)
    os.close(reader)
    os.close(writer)
    assert pid_of(answers) == first


@pytest.mark.parametrize("code", ["raise SystemExit", "print('other', flush=True); input()", None])
def test_a_process_that_does_not_get_ready_is_the_users_to_mend(code, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if code:
        (tmp_path / "no_answers.py").write_text(code)
    worker = WorkerProcess("no_answers", "install no_answers")
    with pytest.raises(UserError, match="install no_answers"):
        worker.ensure_started()
    assert worker.process is None


def test_nor_may_it_take_long(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_process, "STARTUP_TIMEOUT_S", 0.2)
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="slow"):
        WorkerProcess("slow", "slow to start").start()


def test_memory_is_limited(answers):
    assert answers.ask(f"allocate {MEMORY // 4}", 30) == str(MEMORY // 4)
    with pytest.raises(TimeoutError):
        answers.ask(f"allocate {MEMORY}", 30)


def test_an_interrupt_concerns_the_process_that_asks(answers):
    assert answers.ask("interrupt", 30) == f"interrupt {answers.process.pid}"


def test_an_alarm_is_set_while_a_line_is_answered(answers, monkeypatch):
    assert 0 < int(answers.ask("alarm", 30)) <= worker_process.SPARE_SECONDS
    monkeypatch.setattr(worker_process, "signal", object())  # without alarms, as on Windows
    worker_process.set_alarm(1)


def test_no_alarm_rings_after_an_answer(answers, tmp_path, monkeypatch):
    """With an alarm of a second, a process that answers at once lives longer."""
    code = ANSWERS.replace("answer_lines(", "w.SPARE_SECONDS = 1\nanswer_lines(")
    (tmp_path / "brief.py").write_text("import dsv3_ref.data.worker_process as w\n" + code)
    worker = WorkerProcess("brief", "")
    first = pid_of(worker)
    time.sleep(1.2)
    assert pid_of(worker) == first
    with pytest.raises(TimeoutError):
        worker.ask("sleep 30", 20)
    assert worker.process is None
