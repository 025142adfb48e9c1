"""A process forked from the warm server is as a new one: it has its own environment, folder, streams and end."""

import os
import signal

import forked


def test_it_has_its_own_environment_folder_arguments_streams_and_exit_code(tmp_path):
    program = (
        "import os, sys; print(os.getcwd(), os.environ['WHO'], *sys.argv); print('hm', file=sys.stderr); sys.exit(3)"
    )
    done = forked.run(["-c", program, "a", "b c"], cwd=tmp_path, env={**os.environ, "WHO": "ü"})
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} ü -c a b c\n", "hm\n")


def test_a_warning_is_an_error_there_and_an_error_is_exit_code_1():
    done = forked.run(["-c", "import warnings; warnings.warn('x')"])
    assert done.returncode == 1
    assert "UserWarning: x" in done.stderr


def test_a_script_is_main_and_a_signal_ends_it(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(
        "import beside, time\nif __name__ == '__main__':\n    print(__file__, flush=True)\n    time.sleep(1000)\n"
    )
    (tmp_path / "beside.py").write_text("")
    with forked.Forked([script], session=True) as process:
        assert process.stdout.readline() == f"{script}\n"
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        assert process.poll() is None
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
