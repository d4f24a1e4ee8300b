"""The files themselves: comments, required files, what the repository says about itself."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from helpers import NEEDED, ROOT, need

SCRIPTS = sorted(path.name for path in ROOT.glob("*.sh"))
PROGRAMS = ["main.py", *sorted(f"tools/{path.name}" for path in ROOT.glob("tools/*.py"))]
LONG = {"parse_args"}  # one line a flag
CHOICES = (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def bare_lines(source):
    """Numbers of the lines of Python code that carry no comment; docstrings, strings that go on, brackets need none."""
    code, noted = {}, set()
    skip = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            noted.add(token.start[0])
        elif token.type not in skip:
            for number in range(token.start[0], token.end[0] + 1):
                code.setdefault(number, []).append(token.string)
    free = re.compile(r"[)\]},]|[rbfRBF]{0,2}['\"].*", re.DOTALL)
    return [number for number, parts in sorted(code.items())
            if number not in noted and not all(free.fullmatch(part) for part in parts)]  # fmt: skip


def functions(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def inside(functions, kinds):
    """The nodes of some kinds that stand inside functions."""
    return [node for function in functions for node in ast.walk(function) if isinstance(node, kinds)]


def choices(source):
    """{line: conditional expressions and comprehensions} of each statement that has more than one."""
    found = {}
    for statement in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]:
        todo, count = list(ast.iter_child_nodes(statement)), 0
        while todo:
            node = todo.pop()
            if not isinstance(node, ast.stmt | ast.ExceptHandler):
                count += isinstance(node, CHOICES)
                todo += ast.iter_child_nodes(node)
        if count > 1:
            found[statement.lineno] = count
    return found


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


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_line_of_the_programs_carries_a_comment(name):
    """The rule of style: a comment behind every line of code, none over 120 columns, none cut in two."""
    source = (ROOT / name).read_text()
    assert bare_lines(source) == []
    assert max(map(len, source.splitlines())) <= 120
    assert not re.findall(r"# …|# .*…$", source, re.M)


def test_the_trainer_is_read_in_a_sitting():
    """Limits of lines, wide lines, functions; no class and hardly an import in a function; one choice a statement."""
    source = (ROOT / "main.py").read_text()
    lines, known = source.splitlines(), functions(source)
    assert len(lines) <= 1500
    assert sum(len(line) > 110 for line in lines) < 150
    assert [node.name for node in inside(known, ast.ClassDef)] == []
    imports = [lines[node.lineno - 1] for node in inside(known, ast.Import | ast.ImportFrom)]
    assert len(imports) <= 5 and all("# " in line for line in imports)
    long = {node.name for node in known if node.end_lineno - node.lineno >= 80}
    assert long <= LONG
    assert choices(source) == {}
    pairs = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)
             and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)]  # fmt: skip
    assert pairs == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_line_of_the_shell_scripts_carries_a_comment(name):
    """The rule of style, for the scripts around the trainer; no program is hidden in one."""
    source = (ROOT / name).read_text()
    assert bare_shell_lines(source) == []
    assert re.findall(r"<<-?['\"\\\\]", source) == []  # a here-document of code; the guides expand their variables
    assert not re.findall(r"# …|# .*…$", source, re.M)
    assert max(map(len, source.splitlines())) <= 120


def test_the_style_checks_find_what_they_look_for():
    """The checks above can fail."""
    assert bare_lines('x = 1  # why\ny = f(  # call\n    2,\n    "text"\n)\n"""text"""\n@f\n') == [3, 7]
    assert bare_shell_lines("a=1  # why\nb=2\ncat <<END  # text\nfree\nEND\nif x; then  # why\nfi\n") == [2]
    assert choices("x = [a if b else c for a in d]\nif [a for a in b]:\n    x = [a for a in b]\n") == {1: 2}
    nested = functions("def f():\n    import os\n    class A:\n        pass\n")
    assert len(inside(nested, ast.ClassDef)) == len(inside(nested, ast.Import)) == 1


def test_test_files_stand_alone():
    """None imports from another one, and all fixtures are in conftest.py."""
    for path in ROOT.glob("tests/test_*.py"):
        wrong = r"^ *(?:from|import) (?:test_|conftest).*|^@pytest\.fixture.*"
        assert re.findall(wrong, path.read_text(), re.M) == [], path


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_program_skips_a_test_with_the_reason_and_fails_it_under_ci(name, monkeypatch):
    """The reason names the program and the Debian package that has it."""
    monkeypatch.setenv("PATH", "/nowhere")
    for value, outcome in (("", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", value)
        with pytest.raises(outcome, match=f"{name} is missing: apt-get install {NEEDED[name]}"):
            need(name)


def tracked():
    """Names of the files in the repository, or a skip where that cannot be told."""
    need("git")
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


def test_no_binary_is_committed():
    """S1 to S10: no wheel, no tool's leftovers: all files are text, but for pictures in docs/."""
    binaries = [name for name in tracked() if not re.fullmatch(r"docs/.*\.png", name)
                and (ROOT / name).is_file() and b"\0" in (ROOT / name).read_bytes()]  # fmt: skip
    odd = [name for name in tracked() if re.search(r"\.(whl|so|o|pt|bin|safetensors|gguf|zip|gz|arrow|pyc)$", name)]
    assert "main.py" in tracked() and binaries == odd == []


def test_no_environment_is_committed():
    """S1 to S10: .venv, a directory or a link to one, belongs to a machine and not to the repository."""
    assert not [name for name in tracked() if name.startswith(".venv")]


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
