"""Draw the loss curve of a run of main.py, finished or not, as a picture.

    pip install matplotlib
    python examples/loss_curve.py quickstart/model docs/loss.png
"""

import argparse
import json
import sys
from pathlib import Path


def history(output_dir):
    """Return the log (list of dict) of a run: that of the finished model, or else of its newest checkpoint."""
    states = [output_dir / "trainer_state.json"]
    states += sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: -int(path.parent.name[11:]))
    for state in states:
        if state.exists():
            return json.loads(state.read_text(encoding="utf-8"))["log_history"]
    sys.exit(f"loss_curve.py: {output_dir} holds no trainer_state.json: give the --output_dir of a run that has saved")


def draw(log, title):
    """Return a matplotlib figure of the losses in a log (list of dict) over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, name, style in (("loss", "training", "o-"), ("eval_loss", "validation", "s--")):
        points = [(row["step"], row[key]) for row in log if key in row]
        if len(points) > 1 or (points and key == "loss"):  # one evaluation is no curve
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.set(xlabel="optimizer steps", ylabel="loss, nats a token", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False)
    return figure


def main():
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="the --output_dir of the run")
    parser.add_argument("picture", type=Path, help="a .png or .svg")
    parser.add_argument("--title", default="", help="stands above the curve")
    args = parser.parse_args()
    log = history(args.output_dir)
    try:
        figure = draw(log, args.title)
    except ImportError as error:
        sys.exit(f"loss_curve.py: {error}: pip install matplotlib")
    try:
        figure.savefig(args.picture, dpi=110)
    except (OSError, ValueError) as error:
        sys.exit(f"loss_curve.py: {args.picture} cannot be written ({error}): name a .png or .svg in a directory")
    print(f"{args.picture}: {sum('loss' in row for row in log)} points of training")


if __name__ == "__main__":
    main()
