"""The projection head g: representations h -> projections z, on which the contrastive loss works.

Training throws it away at its end: z is to be the same for all views of an image, so it loses what they differ in, such
as color, which h keeps for other tasks (Chen et al. 2020, section 4.2).
"""

from typing import Literal

from torch import Tensor, nn

HEAD_KINDS = ("identity", "linear", "nonlinear", "deep")


class ProjectionHead(nn.Module):
    """Projection head g: h (N, in_dim) -> z (N, out_dim), not normalised (Chen et al. 2020, sections 2.1 and 4.2).

    As in google-research/simclr, a hidden layer is Linear -> BN -> ReLU and the last layer Linear -> BN without a
    shift; no Linear before a BN has a bias. Weights start as torch's Linear does (google-research/simclr: normal,
    standard deviation 0.01).

    Args:
        in_dim: size of h.
        kind: "identity" (z = h), "linear" (the last layer alone), "nonlinear" (one hidden layer, the paper's head) or
            "deep" (`layers` layers: SimCLRv2, Chen et al. 2020b).
        hidden_dim: size of the hidden layers; None: that of h. Only for "nonlinear" and "deep".
        projection_dim: size of z. "identity" does not read it: its z has the size of h.
        layers: number of Linear layers of "deep"; the other kinds do not read it.
        batch_norm: True, after every Linear; "hidden", in the hidden layers only; False, nowhere. A Linear without BN
            has a bias.
    Attributes:
        out_dim: size of z.
        layers: nn.Sequential of the layers, each with its BN and ReLU: `head.layers[:k]` maps h to the k-th layer's
            output, from which SimCLRv2 fine-tunes.
    Raises:
        ValueError: for an unknown kind or batch_norm, a size below 1, fewer than 2 layers of "deep", or a hidden_dim
            for a head without hidden layers.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        kind: Literal["identity", "linear", "nonlinear", "deep"] = "nonlinear",
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        layers: int = 3,
        batch_norm: bool | Literal["hidden"] = True,
    ):
        super().__init__()
        if kind not in HEAD_KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(HEAD_KINDS)}.")
        if batch_norm not in (True, False, "hidden"):
            raise ValueError(f"batch_norm={batch_norm!r} is not one of True, False, 'hidden'.")
        if hidden_dim is not None and kind in ("identity", "linear"):
            raise ValueError(f"kind={kind!r} has no hidden layer for hidden_dim={hidden_dim}. Leave it out.")
        if kind == "deep" and layers < 2:
            raise ValueError(f"layers={layers}: a deep head has at least 2. For one layer use kind='linear'.")
        hidden_dim = in_dim if hidden_dim is None else hidden_dim
        for name, dim in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("projection_dim", projection_dim)):
            if dim < 1:
                raise ValueError(f"{name}={dim} must be at least 1.")

        hidden_layers = {"identity": 0, "linear": 0, "nonlinear": 1, "deep": layers - 1}[kind]
        self.layers = nn.Sequential()
        dim = in_dim
        for _ in range(hidden_layers):
            self.layers.append(make_layer(dim, hidden_dim, batch_norm=batch_norm is not False, last=False))
            dim = hidden_dim
        if kind != "identity":
            self.layers.append(make_layer(dim, projection_dim, batch_norm=batch_norm is True, last=True))
            dim = projection_dim
        self.out_dim = dim

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)  # (N, out_dim)


def make_layer(in_dim: int, out_dim: int, *, batch_norm: bool, last: bool) -> nn.Sequential:
    """Linear, BN if asked for, ReLU; the last layer has no ReLU, and its BN no shift."""
    layer = nn.Sequential()
    layer.add_module("linear", nn.Linear(in_dim, out_dim, bias=not batch_norm))
    if batch_norm:
        bn = nn.BatchNorm1d(out_dim)
        if last:
            # `center=False` of google-research/simclr: one shift for all z would only move them towards each other.
            bn.register_parameter("bias", None)  # torch's own `bias=False` for BN is not in every release we support
        layer.add_module("bn", bn)
    if not last:
        layer.add_module("relu", nn.ReLU(inplace=True))
    return layer
