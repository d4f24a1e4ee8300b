"""Print docs/flags.md: every flag of main.py with its default, those that it refuses, those of other trainers.

    python tools/flags.py > docs/flags.md
"""
import os  # environment of main.py
import re  # takes the help apart
import subprocess  # runs main.py --help
import sys  # the Python that runs this; where main.py is
from pathlib import Path  # main.py beside this directory

HERE = Path(__file__).resolve().parent.parent  # where main.py is
HEAD = (  # above the table of our flags
    """# Flags of main.py

Made from `python main.py --help` by `python tools/flags.py > docs/flags.md`; a test compares the two. Dashes may stand
for underscores. A misspelt flag is an error that names the nearest real one.
""")
TAIL = (  # between the two tables
    """
## Flags of the Trainer

Every option of [`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) works
beside these: `--max_steps 1000`, `--lr_scheduler_type cosine`, `--dataloader_num_workers 4`, `--torch_compile` and
others. These are refused, as each would break a promise of the README:

| flag | because it |
|---|---|
""")

OTHERS = (  # above the last table
    """
## Flags of other trainers

What main.py answers to a flag of run_clm, transformers 4, TRL, Axolotl, LLaMA-Factory, Unsloth, torchtune, LitGPT
or nanoGPT; names of YAML files are written as flags.

| flag | answer |
|---|---|
""")

def sections(text):  # takes the help apart
    """Yield (title, [(flag, what it does, default)]) of each section in the text that `main.py --help` prints."""
    text = re.sub(r"\n {8,}", "  ", text)  # a long flag's words stand on a line of their own
    for part in text.split("\n\n"):  # argparse leaves a blank line between sections
        title, _, lines = part.partition(":\n")  # "model:", and below it a line for each flag
        flags = re.findall(r"^  (--\w+).*?  +(\S.*?) \(default: (.*)\)$", lines, re.MULTILINE)  # [] in the usage
        if flags:  # "options" holds --help alone, which has no default
            yield title, flags  # a title and its flags

def page(text, refused, foreign):  # puts the page together
    """Return docs/flags.md (str). text: what `main.py --help` prints; refused, foreign: {flag: words}."""
    lines = [HEAD, "| flag | default | what it does |", "|---|---|---|"]  # one table for all sections
    for title, flags in sections(text):  # in the order of parse_args()
        lines.append(f"| **{title}** | | |")  # a row of its own
        for flag, words, default in flags:  # without a value argparse says None or False
            words_for = {"None": "none", "False": "off", "['tensorboard']": "`tensorboard`"}  # as a user would say it
            shown = words_for.get(default, f"`{default}`")  # any other value is printed as code
            lines.append(f"| `{flag}` | {shown} | {words} |")  # a row of the table
    rows = [f"| `{flag}` | {reason} |" for flag, reason in refused.items()]  # in main.py's order
    others = [f"| `{flag}` | {words} |" for flag, words in foreign.items()]  # by what they are about
    return "\n".join([*lines, TAIL + "\n".join(rows), OTHERS + "\n".join(others), ""])  # ends with a line break

def help_text():  # what a user sees
    """Return what `main.py --help` prints, in lines of any length."""
    command = [sys.executable, HERE / "main.py", "--help"]  # answers before torch is loaded
    wide = os.environ | {"COLUMNS": "500"}  # no flag's words are broken
    return subprocess.run(command, env=wide, capture_output=True, text=True, check=True).stdout  # fails as main.py does

if __name__ == "__main__":  # not when a test imports it
    sys.path.insert(0, str(HERE))  # main.py is no installed package
    from foreign_flags import FOREIGN  # in this directory

    from main import REFUSED  # not at the top: a test has main already
    print(page(help_text(), REFUSED, FOREIGN), end="")  # the page ends with a line break
