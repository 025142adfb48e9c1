"""What an encoder is worth: kNN and linear evaluation of its frozen features, with yardsticks and intervals."""

from simclr.eval.classifier import ProbeResult
from simclr.eval.features import encoder_sha256, extract_features, raw_pixels
from simclr.eval.knn import default_k, knn_accuracy, knn_predict, nearest
from simclr.eval.linear import linear_evaluation_sgd, linear_probe_sgd, train_linear_sgd
from simclr.eval.logreg import REGULARIZATION_GRID, NotConverged, linear_probe
from simclr.eval.metrics import confusion_matrix, top_k_accuracy, wilson_interval
from simclr.eval.quality import alignment, instance_retrieval, rank_me, spread, uniformity

__all__ = [
    "REGULARIZATION_GRID",
    "NotConverged",
    "ProbeResult",
    "alignment",
    "confusion_matrix",
    "default_k",
    "encoder_sha256",
    "extract_features",
    "instance_retrieval",
    "knn_accuracy",
    "knn_predict",
    "linear_evaluation_sgd",
    "linear_probe",
    "linear_probe_sgd",
    "nearest",
    "rank_me",
    "raw_pixels",
    "spread",
    "top_k_accuracy",
    "train_linear_sgd",
    "uniformity",
    "wilson_interval",
]
