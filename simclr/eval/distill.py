"""Distillation: a student of any size taught by the fine-tuned network on images without labels (SimCLRv2, Chen et al.
2020b, section 2.3, equations 2 and 3)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from simclr.encoders import Stem, build_encoder
from simclr.eval.features import check_split
from simclr.eval.few_labels import labelled_part, labels_per_class
from simclr.eval.finetune import Crops, descent, score, tune, usual_epochs, zero_classifier
from simclr.eval.protocol import FrozenFeatures, Outcome
from simclr.eval.training import WithHead, fed_as, train_epochs


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, labelled: Tensor, *, temperature: float, alpha: float
) -> Tensor:
    """Equation 3, divided by the number of images: labels where they are known, the teacher's probabilities everywhere.

        - (1 - alpha) sum over labelled  log P_S(y | x)  -  alpha sum over all  sum_y P_T(y | x; t) log P_S(y | x; t)

    Args:
        student, teacher: logits (n, C); the teacher gets no gradient.
        labels: (n,) int64, looked at where `labelled`, (n,) bool.
        temperature: t > 0, divides the logits of both.
        alpha: in [0, 1].
    Returns:
        A scalar.
    """
    taught = (teacher.detach() / temperature).softmax(1)
    loss = -alpha * (taught * (student / temperature).log_softmax(1)).sum()
    if alpha < 1:
        own = student.log_softmax(1).gather(1, labels[:, None])[:, 0]  # (n,)
        loss = loss - (1 - alpha) * (own * labelled).sum()
    return loss / len(student)


def distill(
    frozen: FrozenFeatures,
    *,
    student: str = "resnet8",
    width: float = 1.0,
    depth: float = 1.0,
    phi: int | None = None,
    stem: Stem = "auto",
    fraction: float = 0.1,
    temperature: float = 1.0,
    alpha: float = 1.0,
    epochs: int = 100,
    batch_size: int = 256,
    base_lr: float = 0.1,
    weight_decay: float = 1e-4,
    teacher_epochs: int | None = None,
    teacher_base_lr: float = 0.005,
    from_layer: int = 0,
    seed: int = 0,
) -> dict[str, Outcome]:
    """The protocol: the encoder fine-tuned on some labels teaches a student on all images, labelled or not.

    The teacher is that of `semi_finetune` with the first draw of labels. The student begins at random and sees crops
    and flips; SGD with Nesterov momentum .9, cosine to zero. Teacher and student are a result each; beside them the
    random encoder says what a teacher from scratch is worth.

    Args:
        frozen: the encoder and its features.
        student: its network, a name that `build_encoder` knows; the run's own for self-distillation.
        width: of the student, multiplies every channel of a ResNet or EfficientNet.
        depth: of the student, multiplies the blocks of every stage, likewise.
        phi: of the student "efficientnet": 0 to 7 for the width and depth of B0 to B7.
        stem: of the student.
        fraction: of the training labels that the teacher is tuned with, the same number of each class.
        temperature: divides the logits of teacher and student before they are compared.
        alpha: weight of the teacher's probabilities; 1 - alpha is that of the labels of the labelled images.
        epochs: of the student, over all training images.
        batch_size: images a step.
        base_lr: of the student, per 256 images.
        weight_decay: of the student, L2.
        teacher_epochs: of fine-tuning, over the labelled images. If not given: those of `semi_finetune`.
        teacher_base_lr: of fine-tuning, per image, see `semi_finetune`.
        from_layer: how many layers of the projection head the teacher keeps: 0 for h, 1 as in SimCLRv2.
        seed: of the labels, the student's first weights, the order of the images and their crops.
    Raises:
        ValueError: if a setting is out of range, or the student has none of that name.
        RuntimeError: if a training diverges.
    """
    if not 0 < fraction <= 1 or not temperature > 0 or not 0 <= alpha <= 1 or epochs < 1 or not base_lr > 0:
        raise ValueError(
            f"fraction={fraction}, temperature={temperature}, alpha={alpha}, epochs={epochs}, base_lr={base_lr}: "
            "needed a fraction in (0, 1], a temperature > 0, alpha in [0, 1], 1 epoch or more and base_lr > 0."
        )
    num_classes, labels = check_split(*frozen.train, *frozen.test), frozen.train[1]
    channels = frozen.train_images.images(torch.zeros(1, dtype=torch.int64)).shape[1]
    scaled = {"width": width, "depth": depth, "phi": phi, "stem": stem}
    body = build_student(student, frozen.encoder, channels, seed=seed, **scaled)
    part = labelled_part(labels, labels_per_class(labels, fraction), seed=seed, draw=0)
    usual = usual_epochs(len(part), len(labels), batch_size)
    options: dict[str, Any] = {"epochs": teacher_epochs or usual, "batch_size": batch_size, "base_lr": teacher_base_lr}
    teacher = tune(frozen, part, **options, from_layer=from_layer, optimizer="lars", seed=seed)
    teacher.about["labels"] = len(part)
    of_teacher = teacher.score(frozen)
    device = torch.device(frozen.device)
    body.to(device)
    classifier = zero_classifier(body.feature_dim, num_classes).to(device)
    lr = base_lr * batch_size / 256
    optimizer = descent(body, classifier, lr, weight_decay, "sgd")
    order = Crops(frozen, body, torch.arange(len(labels)), batch_size, seed)
    steps = epochs * order.per_epoch
    known = torch.zeros(len(labels), dtype=torch.bool)
    known[part] = True

    def batches(epoch: int) -> Iterator[tuple[Tensor, Any]]:
        teacher.body.eval()
        for index, view in order(epoch):
            with torch.no_grad():
                taught = teacher.logits(view)
            yield view, (taught, labels[index].to(device), known[index].to(device))

    training = train_epochs(
        nn.Sequential(body, classifier),
        optimizer,
        batches,
        lambda step: lr * (1 + math.cos(math.pi * step / steps)) / 2,
        steps=steps,
        per_epoch=order.per_epoch,
        loss=lambda logits, target: distillation_loss(logits, *target, temperature=temperature, alpha=alpha),
        of="distillation",
        hint=f"lower base_lr={base_lr}",
    )
    for _ in training:
        pass
    about = {"steps": steps, "labels": len(part), "parameters": sum(p.numel() for p in body.parameters())}
    of_student = score(body, classifier, frozen, about)
    return {
        "teacher": Outcome(of_teacher.predictions, of_teacher.top5, of_teacher.about, labelled=part),
        f"student={student}": Outcome(of_student.predictions, of_student.top5, about, labelled=part),
    }


def build_student(name: str, like: nn.Module, channels: int, *, seed: int = 0, **options: Any) -> WithHead:
    """A fresh encoder of images of so many channels, that is fed as another one.

    Args:
        name: that `build_encoder` knows.
        like: the encoder whose images it takes.
        channels: of the images.
        seed: of its weights.
        options: width, depth, phi and stem, as there.
    Raises:
        ValueError: for what the network of that name does not have.
    """
    image_size: Any = like.image_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            encoder: Any = build_encoder(name, image_size=image_size, channels=channels, **options)
        except ValueError as error:
            raise ValueError(f"the student of distill: {str(error).replace('encoder=', 'student=')}") from error
    fed_as(encoder, like)
    return WithHead(encoder, None, encoder.feature_dim)
