"""Pretrain an image encoder with SimCLR.

    python train.py                                               the built-in images, the default settings
    python train.py photos                                        any folder of images
    python train.py --config configs/pretrain/cifar10_resnet18.yaml --data.train_dir cifar10/train --trainer.devices 8
    python train.py --ckpt_path runs/NAME/checkpoints/last.ckpt   continue a run
    python train.py --help                                        every setting

Leaves runs/NAME/ with checkpoints, metrics, views.png and encoder.safetensors. Evaluate it with linear_eval.py.
"""

from simclr.cli.train import train

if __name__ == "__main__":
    train()
