"""Reads flags of main.py from a YAML file: --config FILE.yaml. JSON is YAML, too."""
import json  # nested values become JSON objects

import yaml  # PyYAML, which transformers needs, too

SEVERAL = ("train_file", "validation_file", "sample_prompt")  # flags that add up when they are repeated
LISTS = (*SEVERAL, "report_to", "include_for_metrics", "label_names", "debug")  # flags that take more than one value

class Fault(Exception):  # what is wrong with a file, in a sentence without the file's name
    """Raised by the functions below, and caught by words()."""

class Loader(yaml.BaseLoader):  # leaves each value as it is typed: 010, 1e-5, no and 1:30 are what they look like
    """Reads mappings, lists and texts. A name that stands twice in a mapping is a Fault: YAML would take the last."""

def pairs(loader, node):  # called by PyYAML for each mapping; node: its names and values, with their places
    """Return the dict of a mapping, whose names have _ for -, as on a command line. Raises: Fault."""
    found = {}  # name → value
    for key, value in node.value:  # in the file's order
        name = loader.construct_object(key, deep=True)  # a text, unless it is nested
        place = f"line {key.start_mark.line + 1}: "  # counted from 1, as editors do
        if not isinstance(name, str):  # a list, a mapping
            raise Fault(f"{place}{name!r} is no name of a flag")  # "? [a]: b"
        if (name := name.replace("-", "_")) in found:  # perhaps two halves of a long file
            raise Fault(f"{place}{name} stands there twice: remove one")  # whatever the values are
        found[name] = loader.construct_object(value, deep=True)  # str, list or dict
    return found  # of this mapping
Loader.add_constructor("tag:yaml.org,2002:map", pairs)  # for each mapping in a file

def number(text):  # text (str): a value in a nested mapping → what JSON has for it: 1e-6, true, "text"
    try:  # main.py passes JSON on to the Trainer
        return json.loads(text.lower())  # True is true
    except ValueError:  # any other word
        return text  # a text
def spelled(name, value):  # name (str): of a flag; value: str, list or dict
    """Return the words that stand behind the flag on a command line (list[str]). Raises: Fault."""
    if value in ("", "~", "null"):  # "name:" with nothing behind
        raise Fault(f"{name} has no value: give one, or leave the line out")  # the default would be a guess
    if isinstance(value, dict):  # of --lr_scheduler_kwargs and the like
        if not name.endswith(("_kwargs", "_config")):  # a section, as other trainers have them
            raise Fault(f"{name} is a section: write the flags in it as lines of their own")  # no flag has that name
        return [json.dumps({key: number(item) for key, item in value.items()})]  # as it is typed in quotes
    values = value if isinstance(value, list) else [value]  # several files, prompts, reporters
    if len(values) > 1 and name.lstrip("_") not in LISTS:  # the second would belong to no flag
        raise Fault(f"{name} takes one value: write no list")  # whichever is meant
    if not values or not all(isinstance(item, str) and item for item in values):  # a list in a list, a mapping
        raise Fault(f"{name} holds no text, no number and no list of them")  # what a flag takes
    return values  # True and False, as the switches take them

def words(path, typed, known, hint):  # typed (list[str]): words of the command line; known: all flags
    """Return (words, note, fault): the flags in a file that the command line does not give, as they are typed.

    path (str): the file. hint: function of an unknown flag → what may be meant. note, fault (str): "" if there is none.
    """
    given = [word.partition("=")[0] for word in typed if word.startswith("--")]  # flags
    bare = {*given} | {flag.replace("--no_", "--") for flag in given}  # --no_x is about --x
    found, lost = [], []  # words; names that the command line replaces
    try:  # the first fault ends it
        with open(path, encoding="utf-8-sig") as file:  # the mark of Windows' editors is skipped
            values = yaml.load(file, Loader)  # texts, lists and mappings alone: nothing is executed
        if not isinstance(values, dict):  # empty, a list, a bare text
            raise Fault("it holds no mapping of flags, such as 'learning_rate: 1e-5', one a line")  # how it is written
        for name, value in values.items():  # in the file's order
            flag = "--" + name.lstrip("-_")  # --name works, too
            if flag == "--config":  # nothing would read it
                raise Fault("config stands in the file itself: remove it")  # one file is all
            if not {flag, flag.replace("--no_", "--")} & {*known}:  # misspelt, or of another trainer
                raise Fault(f"unknown flag {name}{hint(flag)}; see python main.py --help")  # the nearest
            behind = spelled(name, value)  # checked also where the command line wins
            if {flag, flag.replace("--no_", "--")} & bare:  # the command line wins
                lost.append(name)  # said in the note
            elif len(behind) == 1 or name.lstrip("_") in SEVERAL:  # as if it had been typed
                found += [f"{flag}={word}" for word in behind]  # =, as a word may begin with a dash
            else:  # reporters and the like
                found += [flag, *behind]  # repeated, the last one would win
    except Fault as fault:  # of the file's contents
        place = ", " if str(fault).startswith("line ") else ": "  # FILE, line 3: sentence
        return [], "", f"--config {path}{place}{fault}"  # one sentence
    except OSError as error:  # missing, a directory, no permission
        return [], "", f"--config {path} cannot be read ({error.strerror}): give a YAML file of flags"  # Linux's reason
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no YAML, no UTF-8, brackets without end
        return [], "", f"--config {path} is no YAML file: {' '.join(str(error).split())}"  # with line and column
    note = f"; the command line replaces {', '.join(lost)}" * bool(lost)  # nothing is silent
    return found, f"config   {path}: {len(values):,} flags{note}", ""  # without a fault
