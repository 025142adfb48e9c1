"""Operations of a step, against those counted by hand."""

from simclr.profile import count_operations
from tiny import tiny_model


def test_operations_are_those_counted_by_hand():
    model = tiny_model(encoder="resnet8", width=1, stem="small", head="linear", projection_dim=8)
    convolutions = 16 * 16 * (3 * 16 + 2 * 16 * 16) * 9  # stem and first stage, 16 pixels
    convolutions += 8 * 8 * (16 * 32 + 32 * 32) * 9 + 8 * 8 * 16 * 32  # second stage and its shortcut
    convolutions += 4 * 4 * (32 * 64 + 64 * 64) * 9 + 4 * 4 * 32 * 64
    forward, backward = count_operations(model, 1)  # image, of two views
    assert forward == 2 * 2 * (convolutions + 64 * 8)
    assert backward == 2 * forward - 2 * 2 * 16 * 16 * 3 * 16 * 9  # no gradient of the images
