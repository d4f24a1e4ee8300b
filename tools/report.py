"""What main.py says before and around a training: the plan, the time that is left, and what a dry run has found.

Each function takes facts and returns lines, which rank 0 prints. Nothing here changes what is trained.
"""
import glob  # files of a checkpoint
import math  # whole numbers of steps
import os  # checkpoints of earlier calls, the environment
import re  # names of checkpoints, words of errors
import resource  # the most memory that a process has held
import shutil  # free space
import sys  # the command line
import threading  # hears of errors in TensorBoard's writer thread
import time  # seconds
import traceback  # errors with all their causes

SAMPLE_TOKENS = 40  # of each continuation: two lines
ADAM = 12  # bytes of a checkpoint for each parameter: weight, mean and square in float32

def duration(seconds):  # → "40 s", "12 min" or "3.2 h"
    if seconds < 90:  # a moment
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"  # 0.71 s, 40 s
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"  # 90 minutes: 1.5 h
def gigabytes(number):  # → "3.2 GB"; number: bytes
    return f"{number / 1e9:.2g} GB" if number < 1e10 else f"{number / 1e9:.1f} GB"  # 12.4 GB
def steps_of(args, plan, chunks):  # args: Namespace of parse_args(); plan: TrainingArguments; chunks: of an epoch
    """Return {"a_pass", "a_step": chunks of a forward pass, a step, of all ranks; "epoch", "all", "warmup": steps}."""
    a_pass = plan.train_batch_size * plan.world_size  # chunks at a time
    a_step = a_pass * plan.gradient_accumulation_steps  # chunks in an optimizer step
    epoch = max(1, math.ceil(chunks / a_step))  # steps of an epoch, whose last one may be smaller
    epochs = math.ceil(args.num_train_epochs * epoch)  # steps, as the Trainer counts them
    steps = plan.max_steps if plan.max_steps > 0 else epochs  # --max_steps has priority
    at_peak = plan.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy")  # without warm-up
    warmup = 0 if at_peak else plan.get_warmup_steps(steps)  # a value below 1 is a part of steps
    return {"a_pass": a_pass, "a_step": a_step, "epoch": epoch, "all": steps, "warmup": warmup}  # whole numbers
def newest(folder):  # → step of the newest checkpoint in a directory, 0 without one
    names = os.listdir(folder) if os.path.isdir(folder) else []  # of an earlier call
    found = [re.fullmatch(r"checkpoint-(\d+)", name) for name in names]  # None for all else
    return max((int(match[1]) for match in found if match), default=0)  # by number: a copy changes file times

def plan(args, trainer, chunks, before, behind):  # trainer: main.py's FineTuner, ready to train
    """Return the lines of the plan. chunks (int): of the training data, 0 with --do_eval alone.

    before, behind (list): ids that are put around each text, [] for none.
    """
    made, model = trainer.args, trainer.model  # TrainingArguments; on its device, with its attention
    world = made.world_size  # processes on all machines
    size = model.num_parameters()  # a tied head counts once
    dtype = f"{made.mixed_precision} autocast".replace("no autocast", "float32")  # of matrix products
    compiled = ", layers compiled" * trainer.compiled  # in use, not only asked for
    lines = [f"model    {args.model_name_or_path}, {size:,} parameters in float32, "  # the master weights
             f"{model.config._attn_implementation} attention{compiled}",
             f"device   {made.device.type}, {world} process{'es' * (world > 1)}, {dtype}"]
    if chunks:  # --do_eval alone has no plan of steps
        steps = steps_of(args, made, chunks)  # whole numbers
        batch = args.per_device_train_batch_size  # chunks
        lines += [f"batch    {batch} per device x {args.gradient_accumulation_steps} "  # of all ranks
                  f"accumulation x {world} = {steps['a_step']:,} chunks = "
                  f"{steps['a_step'] * args.max_seq_length:,} tokens a step",
                  f"steps    {steps['all']:,} ({steps['all'] / steps['epoch']:.3g} epochs), learning rate "
                  f"{args.learning_rate:g}, warm-up {steps['warmup']:,} steps"]
        if args.early_stopping_patience:  # it may be over sooner
            count = args.early_stopping_patience  # evaluations
            lines.append(f"         fewer, once {count} evaluations in a row are no better than the best")  # in time
        lines += notes(args, chunks, steps, world, ADAM * size)  # a long warm-up, a full disk and the like
    bos, eos = ("with" + "out" * (not ids) for ids in (before, behind))  # words
    curves = f" (tensorboard --logdir {os.path.join(args.output_dir, 'runs')})"  # where the losses are drawn
    nothing = f"nothing is written into {args.output_dir_asked}"  # by a dry run
    output = nothing if args.dry_run else args.output_dir  # the place of the model
    return [*lines, f"data     texts begin {bos} BOS, end {eos} EOS (--add_eos)",  # without EOS a model learns no end
            f"output   {output}{curves * ('tensorboard' in made.report_to)}"]

def notes(args, chunks, steps, world, size):  # steps: of steps_of(); size (int): bytes of a checkpoint
    """Return lines for what is odd in a plan, [] for an ordinary one."""
    a_step, a_pass, warmup = steps["a_step"], steps["a_pass"], steps["warmup"]  # chunks, chunks, steps
    rate = f"{(steps['all'] - 1) / max(warmup, 1):.1%}"  # the most that is reached: the rate starts at 0
    there = [name for name in os.listdir(args.output_dir) if name.startswith("checkpoint-")]  # of earlier calls
    need = (args.save_total_limit + 1 - len(there)) * size  # bytes: the oldest goes once the newest is there
    free = shutil.disk_usage(args.output_dir).free  # bytes, of the disk that holds output_dir
    found = [  # (whether it applies, the line)
        (warmup >= steps["all"],  # the default warm-up is made for long runs
         f"note     the run is shorter than its warm-up: it reaches {rate} of the learning rate; "
         f"lower --warmup_steps, to {steps['all'] // 10} for example"),
        (chunks < a_step > a_pass,  # a handful of texts
         f"note     all {chunks:,} chunks make less than one step of {a_step:,}: lower "
         f"--gradient_accumulation_steps to {max(1, chunks // a_pass)} for a full one"),
        (chunks % a_pass and world > 1,  # some chunks fill up the last batch
         f"note     {-chunks % a_pass:,} chunks are trained on twice an epoch"),
        (free < need,  # the run would end in the middle
         f"warning  {need / 1e9:.2g} GB will be needed for checkpoints in {args.output_dir}, "
         f"where {free / 1e9:.2g} GB are free: see --save_total_limit")]
    return [line for applies, line in found if applies]  # in this order

def time_left(paces, steps):  # paces: seconds of some steps; steps (int): to come
    """Return the line on the time of a training, once it is known: [] if nothing is left to do."""
    pace = sum(paces) / len(paces)  # seconds of a step
    if not steps:  # a run of three steps
        return []  # the end is there
    rest = f"{duration(pace * steps)} for the {steps:,} to come"  # of training alone
    return [f"time     {duration(pace)} a step: {rest}, besides evaluations and checkpoints"]  # minutes_left has all

def curves(trainer, folder, again):  # again (int or None): the first step to be logged anew, None without a training
    """Add TensorBoard's callback to a Trainer, with its files in folder/runs. Returns: its SummaryWriter."""
    import torch.utils.tensorboard  # which needs the package tensorboard
    from transformers.integrations.integration_utils import TensorBoardCallback  # the Trainer's own
    writer = torch.utils.tensorboard.SummaryWriter(os.path.join(folder, "runs"), purge_step=again)  # one curve
    trainer.add_callback(TensorBoardCallback(writer))  # writes each log line at once
    trainer.callback_handler.callbacks[-1]._SummaryWriter = None  # the evaluation at the end opens no new writer
    usual = threading.excepthook  # prints a traceback
    threading.excepthook = lambda end: issubclass(end.exc_type, OSError) or usual(end)  # a full disk ends main.py
    return writer  # also for texts

def samples(trainer, prompts, begin):  # prompts (list[str]): --sample_prompt; begin (list[int]): BOS, or nothing
    """Let the model continue each prompt, greedily; put that into TensorBoard, and return a line for each.

    The training does not notice: no random number is drawn, no cache is switched on, compiled layers keep their graphs.
    """
    import torch  # main.py has loaded it
    from transformers import GenerationConfig  # instead of the model's own, which draws lots
    tokenizer, model = trainer.processing_class, trainer.model  # the model itself, not its wrapper for several ranks
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # where to stop
    greedy = GenerationConfig(max_new_tokens=SAMPLE_TOKENS, do_sample=False, use_cache=False, **ends)  # as in training
    lines = []  # one for each prompt
    training = model.training  # between two steps it may be either
    for number, prompt in enumerate(prompts, 1):  # on all ranks: none waits for another
        ids = begin + tokenizer.encode(prompt, add_special_tokens=False)  # as a text in the training data
        given = torch.tensor([ids], device=trainer.args.device)  # (1, T)
        seen = torch.ones_like(given)  # (1, T): no token is padding
        with torch.compiler.set_stance("force_eager"):  # lengths that no layer was compiled for
            written = model.eval().generate(given, attention_mask=seen, generation_config=greedy)  # (1, T + 40)
        text = tokenizer.decode(written[0, len(ids):])  # with <eos>, if it stops by itself
        lines.append(f"sample   {prompt!r}: {text!r}")  # line breaks as \\n
        if trainer.curves:  # rank 0 has them, with --report_to tensorboard
            trainer.curves.add_text(f"sample {number}", prompt + text, trainer.state.global_step)  # under TEXT
    model.train(training)  # as it was
    return lines  # to be printed by rank 0

# ── The dry run ────────────────────────────────────────────────────────────────────────────────────
# It runs in a hidden directory beside output_dir, which main.py makes, locks and removes. main.py's on_step_end()
# ends its training after three steps, with a checkpoint.
ASKED = "MAIN_PY_DRY_RUN_ASKED"  # in the environment: settings that did not fit into memory, "" if the first ones did

def clear(folder):  # of a dry run, locked: removes what a killed one has left
    for name in os.listdir(folder):  # checkpoints, drafts
        if name != ".lock":  # in use
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)  # nobody else writes there

def dry_run(trainer, run):  # trainer: main.py's FineTuner; run: its Run
    """Train three steps, evaluate a part, save a checkpoint, print what the whole run takes. Returns: exit status."""
    from transformers import IntervalStrategy  # main.py has loaded it
    plan = trainer.args  # TrainingArguments, with the real number of steps
    when = {"evaluations": plan.eval_strategy, "saves": plan.save_strategy}  # "steps", "epoch", "no" or "best"
    plan.eval_strategy = plan.save_strategy = IntervalStrategy.NO  # on_step_end() saves once
    trainer.train()  # three steps, or all if there are fewer
    seen = {"save": time.time() - trainer.saving}  # seconds of a checkpoint, and of a moment behind it
    paces = trainer.paces or [trainer.saving - trainer.began]  # seconds; a run of one step has no second
    seen["step"] = sum(paces) / len(paces)  # seconds of an optimizer step
    seen["evaluation"] = 0.0  # seconds, without validation data
    if data := trainer.eval_dataset:  # chunks
        some = data.take(min(len(data), 8 * plan.eval_batch_size * plan.world_size))  # 8 batches of each rank
        start = time.time()  # seconds since 1970
        trainer.evaluation_loop(trainer.get_eval_dataloader(some), "dry run")  # without a line in the log
        seen["evaluation"] = (time.time() - start) * len(data) / len(some)  # seconds of a whole one
    start = time.time()  # seconds since 1970
    trainer.write_samples()  # they are printed, too
    seen["samples"] = time.time() - start  # seconds
    seen["memory"], seen["device"] = memory(run)  # bytes
    found = glob.glob(os.path.join(glob.escape(run.output_dir), "checkpoint-*", "*"))  # files of the checkpoint
    seen["checkpoint"] = sum(map(os.path.getsize, found))  # bytes
    status = 0  # of all ranks but one
    if run.ranks.rank == 0:  # for all
        lines, status = estimate(run.args, plan, len(trainer.train_dataset), seen, when)  # words
        print(*lines, sep="\n", flush=True)  # the report
    return run.ranks.max(status)  # 1: something is lacking; rank 0 removes the directory when all have come here

def memory(run):  # → (bytes at the peak of the rank that takes most, bytes that there are)
    import psutil  # accelerate needs it, too
    import torch  # main.py has loaded it
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes; ru_maxrss counts in KiB
    if not torch.cuda.is_available():  # a CPU
        return run.ranks.max(resident), psutil.virtual_memory().total  # of the machine, which all programs share
    return run.ranks.max(torch.cuda.max_memory_reserved()), torch.cuda.mem_get_info()[1]  # of a GPU

def estimate(args, plan, chunks, seen, when):  # seen: as measured by dry_run(); when: name → strategy of the Trainer
    """Return (lines, status) on the whole run. status (int): 1 where something is lacking, 0 if the run can start."""
    steps = steps_of(args, plan, chunks)  # whole numbers
    done = newest(args.output_dir_asked)  # steps of earlier calls of the same command
    left = max(0, steps["all"] - done)  # steps to come
    def due(gap):  # gap: steps, or a part of all steps → how often it comes up in the steps to come, the last included
        gap = math.ceil(gap * steps["all"]) if gap < 1 else int(gap)  # in steps, as the Trainer rounds
        return steps["all"] // gap - done // gap + bool(steps["all"] % gap)  # done: nothing comes up twice
    evals = due(plan.eval_steps) if when["evaluations"] != "no" else 0  # within the training
    evals = (plan.eval_on_start + evals + 1) * bool(seen["evaluation"])  # and the finished model; none without data
    gap = plan.eval_steps if when["saves"] == "best" else plan.save_steps  # "best": at most at each evaluation
    saves = (due(gap) if when["saves"] != "no" else 0) + 1  # checkpoints, and the finished model
    looks = evals * (seen["evaluation"] + seen["samples"])  # seconds of all evaluations
    parts = {"training": left * seen["step"], f"{evals:,} evaluations": looks}  # seconds
    parts[f"{saves:,} saves"] = saves * seen["save"]  # seconds
    told = ", ".join(f"{name} {duration(time)}" for name, time in parts.items() if time)  # where the time goes
    kept = args.save_total_limit + 1 - bool(done)  # checkpoints: the oldest goes once the newest is there
    kept += plan.load_best_model_at_end  # the best one stays, however old
    need = min(kept, saves - 1) * seen["checkpoint"]  # bytes
    free = shutil.disk_usage(args.output_dir).free + seen["checkpoint"]  # bytes: the dry run's own goes
    a_step = steps["a_step"] * args.max_seq_length  # tokens
    goes_on = f", {done:,} of them made" * bool(done)  # by an earlier call
    lines = ["", f"Dry run: {steps['all']:,} steps{goes_on}; {left * a_step:,} tokens to come",  # behind a blank line
             f"speed    {duration(seen['step'])} a step, {a_step / seen['step']:,.0f} tokens a second",
             f"time     {duration(sum(parts.values()))} to the end: {told}",
             f"memory   {gigabytes(seen['memory'])} at the peak of a process, of {gigabytes(seen['device'])}",
             f"disk     {gigabytes(need)} for checkpoints, {gigabytes(free)} free"]
    small = free < need  # the run would end in the middle
    if small:  # what mends it
        lines.append("warning  the disk is too small: lower --save_total_limit, or make room there")  # or another disk
    asked = os.environ.get(ASKED, "")  # of the call that was given
    if asked:  # try_smaller() has started this process
        lines.append(f"warning  {asked} did not fit into memory; this does: {settings(args)}")  # to be copied
    return lines, int(bool(asked) or small)  # 1: the call as it was given would not get through

def settings(args):  # → the flags that decide the memory, as they are typed
    words = [f"--per_device_train_batch_size {args.per_device_train_batch_size}",  # chunks at a time
             f"--gradient_accumulation_steps {args.gradient_accumulation_steps}"]  # times that many a step
    words += ["--bf16"] * args.bf16 + ["--gradient_checkpointing"] * args.gradient_checkpointing  # if they are on
    return " ".join([*words, f"--max_seq_length {args.max_seq_length}"])  # the context learnt

def smaller(args):  # args: of a dry run that ran out of memory
    """Return {flag: value} of the next cheapest settings, as REMEDIES of advice.py has them; None: nothing is left."""
    batch, length = args.per_device_train_batch_size, args.max_seq_length  # chunks; tokens
    if batch > 1:  # the same training, a bit slower
        total = batch * args.gradient_accumulation_steps  # chunks of a process in a step
        half = batch // 2  # rounded down
        return {"--per_device_train_batch_size": half, "--gradient_accumulation_steps": -(-total // half)}  # rounded up
    if not args.gradient_checkpointing:  # 20 % slower
        return {"--gradient_checkpointing": True}  # the same training
    return {"--max_seq_length": length // 2} if length >= 256 else None  # changes what is learnt

def with_flags(words, changes):  # words (list[str]): of a command line; changes: {flag: value} of smaller()
    """Return the words with other values of some flags."""
    kept = []  # what stays as it was typed
    skip = False  # whether the word is a value of a flag that is replaced
    for word in words:  # flags and values
        if word.startswith("--"):  # a flag begins
            skip = "--" + word[2:].partition("=")[0].replace("-", "_") in changes  # with it go its values
        kept += [] if skip else [word]  # as it was typed
    return kept + [part for flag, value in changes.items() for part in (flag, str(value))]  # at the end

def try_smaller(error, args):  # error: of a dry run in a single process
    """After a lack of memory start the same dry run in less: this process becomes it. After other errors return."""
    words = " ".join(traceback.format_exception(error))  # with all causes
    lacks = re.search("out of memory|an(no|')t allocate memory|MemoryError", words)  # of torch, of Linux, of Python
    changes = smaller(args) if lacks else None  # None: main.py says what is wrong
    if changes:  # something is left to try
        print(f"note     {settings(args)} does not fit into memory: less is tried", flush=True)  # by a new process
        os.environ.setdefault(ASKED, settings(args))  # the first one is what was asked for
        command = [sys.executable, *with_flags(sys.argv, changes)]  # the command line goes before a --config
        os.execv(sys.executable, command)  # frees all memory; the directory is cleared by its next user
