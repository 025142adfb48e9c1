"""A record as `simclr eval` writes it, by hand."""

from typing import Any

import torch

from simclr.eval.metrics import wilson_interval
from simclr.eval.predictions import packed
from simclr.eval.suite import SCHEMA, summaries


def result(protocol: str, variant: str, right: list[bool], settings: str = "", **changes: Any) -> dict[str, Any]:
    """One result of a record, with these of its test images right; the classes are 0, 1, 2, 0, 1 ..."""
    labels = torch.arange(len(right)) % 3
    said = torch.where(torch.tensor(right), labels, (labels + 1) % 3)
    correct, n = sum(right), len(right)
    parts = [f"{protocol}@last", "epoch2", "split=test", f"n={n}", "res16", *filter(None, (variant, settings))]
    return {
        "protocol": protocol,
        "variant": variant,
        "settings": {},
        "about": {},
        "id": "/".join(parts),
        "hash": f"{protocol}{variant}"[:16],
        "top1": correct / n,
        "ci95": list(wilson_interval(correct, n)),
        "top5": None,
        "mean_per_class": 0.5,
        "mean_per_class_ci95": [0.4, 0.6],
        "top1_without_duplicates": correct / n,
        "n_test": n,
        "predictions": packed(said),
        "yardsticks": {"random_encoder": {"top1": 0.25, "mean_per_class": 0.25}, "raw_pixels": None},
        **changes,
    }


def suite_record(results: list[dict[str, Any]], train: str = "a", **changes: Any) -> dict[str, Any]:
    """A record of these results, whose training images have this hash."""
    n = results[0]["n_test"]
    return {
        "schema": SCHEMA,
        "encoder": "resnet8",
        "encoder_sha256": "0" * 64,
        "epoch": 2,
        "global_step": 20,
        "total_steps": 20,
        "finished": True,
        "yardsticks": ["random_encoder", "raw_pixels"],
        "results": results,
        "summaries": summaries(results),
        "data": {
            "test": "shapes",
            "train_images": 60,
            "test_images": n,
            "note": None,
            "train_sha256": train,
            "test_sha256": "t",
            "images_sha256": "i",
        },
        "duplicates": {"test_images": 0},
        "labels": packed(torch.arange(n) % 3),
        "command": "simclr eval run",
        "date": "2026-01-02T03:04:05+00:00",
        **changes,
    }
