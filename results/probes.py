"""Does a finding depend on the linear probe? The same features, three probes, a line for each run.

    python -m results.probes CHECKPOINT ... >> results/probes.jsonl

four      four learning rates, of which validation chooses: `linear` of eval.py
seven     seven of them, over the same range
logistic  logistic regression of standardised features: no rate; validation chooses the penalty
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python results/probes.py`

import eval
from results.study import circumstances
from support import datasets, probes
from support.command_line import Parser, run_main
from support.devices import choose_device

SEVEN = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)


def sgd(x, y, val, test_x, test_y, classes, rates):
    """Accuracy on the test split of the rate that is best on validation images."""
    scores = [probes.accuracy(each, y[val])
              for each in probes.linear(x[~val], y[~val], x[val], classes, rates)]
    best = rates[probes.place_of_highest(scores)]
    return probes.accuracy(probes.linear(x, y, test_x, classes, [best])[0], test_y)


def logistic(x, y, val, test_x, test_y, classes):
    """The same of logistic regression, and the strength of its penalty."""
    mean, std = x.mean(0), x.std(0)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    scores, weights = [], None
    for strength in STRENGTHS:
        weights = probes.logistic_regression(x[~val], y[~val], classes, strength, weights, 200)
        scores.append(probes.accuracy(probes.predict(weights, x[val]).argmax(1), y[val]))
    best = STRENGTHS[probes.place_of_highest(scores)]
    weights = probes.logistic_regression(x, y, classes, best, iterations=300)
    return probes.accuracy(probes.predict(weights, test_x).argmax(1), test_y), best


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    for checkpoint in parser.parse_args(argv).checkpoints:
        options = eval.parse(["linear", "--checkpoint", checkpoint])
        run = eval.Evaluated(checkpoint, None, options, choose_device("auto"), datasets.load_images)
        y, test_y, names = run.classes()
        val, K = run.validates(run.ids("train")).to(y.device), len(names)
        line = {"checkpoint": checkpoint, "four": {}, "seven": {}, "logistic": {}, "strengths": {}}
        for token, x in run.features("train").items():
            given = x, y, val, run.features("test")[token], test_y, K
            line["four"][token] = sgd(*given, probes.LINEAR_RATES)
            line["seven"][token] = sgd(*given, SEVEN)
            line["logistic"][token], line["strengths"][token] = logistic(*given)
        print(json.dumps(line | circumstances()), flush=True)


if __name__ == "__main__":
    run_main(main)
