"""What every method of pretraining has, as objects: see `simclr.training.method` for what a method is made of."""
