"""The files themselves: comments, required files, what the repository says about itself."""

import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.sh"))


def bare_lines(source):
    """Numbers of the lines of Python code that carry no comment; docstrings and closing brackets need none."""
    code, noted = {}, set()
    skip = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            noted.add(token.start[0])
        elif token.type not in skip and not token.string.startswith(('"""', "'''")):
            for number in range(token.start[0], token.end[0] + 1):
                code.setdefault(number, []).append(token.string)
    return [number for number, parts in sorted(code.items())
            if number not in noted and not all(part in ")]}," for part in parts)]  # fmt: skip


def bare_shell_lines(source):
    """Numbers of the lines of shell code that carry no comment; closing words need none, here-documents are data."""
    bare, until = [], None
    for number, line in enumerate(source.splitlines(), 1):
        words = line.strip()
        if until is not None:
            until = None if words == until else until
            continue
        start = re.search(r"<<-?\s*['\"]?(\w+)['\"]?", line)
        until = start[1] if start else None
        if words and not words.startswith("#") and words not in ("fi", "done", "esac", "}", ")", ";;", "else"):
            if not re.search(r"\s#\s\S", line):
                bare.append(number)
    return bare


def python_parts(source):
    """The Python programs that a shell script carries: its here-documents that end with PYTHON."""
    return re.findall(r"<<'PYTHON'.*?\n(.*?)^PYTHON$", source, re.DOTALL | re.MULTILINE)


def test_every_line_of_the_trainer_carries_a_comment():
    """The rule of style: a comment behind every line of code, none over 120 columns."""
    source = (ROOT / "main.py").read_text()
    assert bare_lines(source) == []
    assert max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_line_of_the_shell_scripts_carries_a_comment(name):
    """The rule of style, for the scripts around the trainer and the Python programs in them."""
    source = (ROOT / name).read_text()
    assert bare_shell_lines(source) == []
    assert [bare_lines(part) for part in python_parts(source)] == [[]] * source.count("<<'PYTHON'")
    assert max(map(len, source.splitlines())) <= 120


def test_the_comment_checks_find_a_bare_line():
    """The two checks above can fail."""
    assert bare_lines('x = 1  # why\ny = f(  # call\n    2,\n)\n"""text"""\n') == [3]
    assert bare_shell_lines("a=1  # why\nb=2\ncat <<END  # text\nfree\nEND\nif x; then  # why\nfi\n") == [2]
    assert [bare_lines(part) for part in python_parts("a <<'PYTHON'  # why\nx = 1\nPYTHON\n")] == [[1]]


def test_no_environment_is_committed():
    """S1 to S10: .venv, a directory or a link to one, belongs to a machine and not to the repository."""
    if not shutil.which("git") or subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("no git, or no checkout")
    files = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    assert "main.py" in files and not [name for name in files if name.startswith(".venv")]


def test_required_files_are_there():
    """S1 to S4, S8 to S10: files at the top level; the placeholder is empty; dependencies are pinned."""
    scripts = ("main.py", "train.py", "example_run.sh", "verify_setup.sh", ".ci/run")
    for name in (*scripts, "requirements.txt", "README.md", "LICENSE"):
        assert (ROOT / name).is_file(), name
    assert (ROOT / "train.py").stat().st_size == 0
    needed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    names = [re.split(r"[=~]", line)[0] for line in needed]
    assert names == ["torch", "transformers", "datasets", "accelerate", "tensorboard"]
    assert all(re.search(r"[=~]=\d", line) for line in needed)
    assert "flash-attn" in (ROOT / "requirements.txt").read_text()


@pytest.mark.parametrize("name", [*SCRIPTS, "tests/run.sh", ".ci/run"])
def test_shellcheck_finds_nothing(name, tmp_path):
    """The scripts are free of what shellcheck knows; it does find an unquoted variable."""
    command = [Path(sys.executable).with_name("shellcheck"), "--shell=bash"]
    done = subprocess.run([*command, ROOT / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "bad.sh").write_text("rm $1\n")
    assert subprocess.run([*command, tmp_path / "bad.sh"], capture_output=True).returncode == 1
