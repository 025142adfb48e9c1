"""Measure a pretrained encoder: linear classifier and kNN on its frozen features, beside two yardsticks.

    python linear_eval.py runs/NAME                               on the images of the run
    python linear_eval.py runs/NAME --data.train_dir photos/train --data.test_dir photos/test
    python linear_eval.py runs/NAME --protocol sgd                the paper's protocol, slower
    python linear_eval.py --help                                  every setting

Prints a small table and writes linear_eval.json into the run folder.
"""

from simclr.cli.linear_eval import linear_eval

if __name__ == "__main__":
    linear_eval()
