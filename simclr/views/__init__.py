"""What the augmentation is made of: drawing, kernels, Kornia's operations around them, and the compiled path."""
