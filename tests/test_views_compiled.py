"""The compiled path against Kornia's operations with the same parameters, compiled and step by step."""

import copy
import pickle
import warnings

import pytest
import torch

from simclr.augment import SimCLRAugmentation
from simclr.views import compiled as fast
from test_augment import EVERYTHING, NOTHING, UNIT, pictures

# Both place their samples on the images to 2e-5 of a pixel, and the hue and the contrast steepen small differences.
CLOSE = {"atol": 5e-5, "rtol": 0}


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled functions run operation by operation: what they compute without the minute of compiling it."""
    monkeypatch.setattr(fast, "compile_once", lambda function: function)


@pytest.fixture
def working_compiler(monkeypatch):
    """A process in which nothing has failed to compile, afterwards neither."""
    monkeypatch.setattr(fast, "_uncompiled", set())
    monkeypatch.setattr(fast, "_said", set())


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (24, 40, 48), (100, 37, 32), (37, 100, 20), (120, 130, 32), (1, 1, 2)]
)
@pytest.mark.usefixtures("uncompiled")
def test_every_operation_agrees_with_kornias_pipeline(height, width, size):
    settings = {**EVERYTHING, "blur_prob": 0.5 * (size > 2)}
    pipeline, chain = (SimCLRAugmentation(size, **settings, **UNIT, compile_views=on) for on in (False, True))
    images, index = pictures(48, height, width), torch.arange(48)
    for view in (0, 1):
        expected = pipeline.view(images, index, 3, 7, view)
        torch.testing.assert_close(chain.view(images, index, 3, 7, view), expected, **CLOSE)
        torch.testing.assert_close(chain.view(images / 255, index, 3, 7, view), expected, **CLOSE)


@pytest.mark.parametrize("blur_prob", [0.0, 0.5])
@pytest.mark.usefixtures("uncompiled")
def test_views_that_are_normalised_before_the_blur_agree_with_kornias_pipeline(blur_prob):
    settings = {"blur_prob": blur_prob, "mean": (0.2, 0.4, 0.7), "std": (0.5, 0.25, 2.0)}
    pipeline, chain = (SimCLRAugmentation(32, **settings, compile_views=on) for on in (False, True))
    images, index = pictures(48, 40, 32), torch.arange(48)
    torch.testing.assert_close(
        chain.view(images, index), pipeline.view(images, index), atol=CLOSE["atol"] / 0.25, rtol=0
    )


@pytest.mark.usefixtures("uncompiled")
def test_each_of_the_24_orders_of_the_jitter_agrees_with_kornias_pipeline():
    settings = {**NOTHING, "jitter_prob": 1.0, **UNIT, "crop_scale": (1, 1), "crop_ratio": (1, 1)}
    pipeline, chain = (SimCLRAugmentation(16, **settings, compile_views=on) for on in (False, True))
    images, index = pictures(1, 16, 16).expand(400, -1, -1, -1), torch.arange(400)
    assert len(pipeline.draw(index, 16, 16)["order"].unique(dim=0)) == 24
    torch.testing.assert_close(chain.view(images, index), pipeline.view(images, index), **CLOSE)


@pytest.mark.usefixtures("uncompiled")
def test_what_is_switched_off_changes_no_bit_of_an_image():
    chain = SimCLRAugmentation(32, **NOTHING, **UNIT, crop_scale=(1, 1), crop_ratio=(1, 1), compile_views=True)
    images = pictures(4) / 255
    assert torch.equal(chain.view(images, torch.arange(4)), images)


def test_one_shape_is_compiled_whatever_the_batch(monkeypatch):
    seen = {}

    def record(function):
        def call(*arguments):
            layout = [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
            seen.setdefault(function.__name__, []).append(layout)
            return function(*arguments)

        return call

    monkeypatch.setattr(fast, "compile_once", record)
    chain, images = SimCLRAugmentation(32, blur_prob=0.5, compile_views=True), pictures(300)
    for count in (1, 7, 128, 300):
        assert chain.view(images[:count], torch.arange(count)).shape == (count, 3, 32, 32)
    assert len(seen) == 3
    for calls in seen.values():
        assert len(calls) > 3
        assert calls == [calls[0]] * len(calls)


def test_views_that_grow_are_compiled_at_more_sizes_than_torch_allows_by_itself(monkeypatch):
    compiled, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, *, options, **others: compiled(f, backend="eager", **others))
    draws = torch.zeros(2, 27)
    function = fast.compile_once.__wrapped__(fast._taps_of_both)
    for size in range(6, 28, 2):
        calls.append(function(draws, 16, 16, size))
    assert len(calls) > torch._dynamo.config.recompile_limit


def test_a_cpu_compiles_only_when_asked_to(monkeypatch):
    def refuse(function):
        raise AssertionError("compiled")

    monkeypatch.setattr(fast, "compile_once", refuse)
    images, index = pictures(2), torch.arange(2)
    SimCLRAugmentation(32).view(images, index)
    with pytest.raises(AssertionError, match="compiled"):
        SimCLRAugmentation(32, compile_views=True).view(images, index)


def no_compiler(function):
    raise torch._dynamo.exc.TorchDynamoException("backend='inductor' raised:\nNo C++ compiler")


def test_where_compiling_fails_one_warning_says_so_and_kornias_pipeline_runs(monkeypatch, working_compiler):
    monkeypatch.setattr(fast, "compile_once", no_compiler)
    pipeline, chain = SimCLRAugmentation(8), SimCLRAugmentation(8, compile_views=True)
    images, index = pictures(4, 8, 8), torch.arange(4)
    with pytest.warns(UserWarning, match=r"torch.compile failed: .* No C\+\+ compiler .*compile_views=False"):
        view = chain.view(images, index)
    assert torch.equal(view, pipeline.view(images, index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(chain.view(images, index), view)


def fails_for(size, kind, message):
    """In place of the compiler: as written, but for views of this size."""

    def compiled(function):
        def call(*arguments):
            if size in [x.shape[-1] if isinstance(x, torch.Tensor) else x for x in arguments]:
                raise kind(message)
            return function(*arguments)

        return call

    return compiled


BROKEN = torch._dynamo.exc.TorchDynamoException, "Not enough registers", "torch.compile failed: Not enough registers"
LIMIT = torch._dynamo.exc.FailOnRecompileLimitHit, "recompile_limit reached", "this process has compiled 64 others"


@pytest.mark.parametrize(("kind", "message", "said"), [BROKEN, LIMIT], ids=["a failure", "the limit"])
def test_what_fails_to_compile_falls_back_alone_and_is_said_once(monkeypatch, working_compiler, kind, message, said):
    """Views of 12 pixels cannot be compiled; those of 8, before and after them, are."""
    compiled, asked = fails_for(12, kind, message), []
    monkeypatch.setattr(fast, "compile_once", lambda function: asked.append(function) or compiled(function))
    small, large, alike = (SimCLRAugmentation(size, compile_views=True) for size in (8, 12, 12))
    images, index = pictures(4, 8, 8), torch.arange(4)
    first = small.view(images, index)
    expected = SimCLRAugmentation(12).view(images, index)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all(torch.equal(x.view(images, index), expected) for x in (large, alike, large))
        large.view(pictures(4, 9, 9), index)  # fails too, for the same reason
    assert len(caught) == 1
    assert f"make views of 12 px of images of 8 x 8, which is slower: {said}" in str(caught[0].message)
    assert ("compiler" in str(caught[0].message)) == (kind is BROKEN[0])
    asked.clear()
    assert torch.equal(small.view(images, index), first)
    assert asked


@pytest.mark.slow
def test_past_the_limit_of_recompilations_the_shapes_that_are_compiled_go_on(monkeypatch, working_compiler):
    torch._dynamo.reset()
    monkeypatch.setattr(fast, "SHAPES", 1)
    small, large = (SimCLRAugmentation(size, blur_prob=0.0, compile_views=True) for size in (8, 12))
    images, index = pictures(4, 8, 8), torch.arange(4)
    first = small.view(images, index)
    with pytest.warns(UserWarning, match="this process has compiled 1 others"):
        assert torch.equal(large.view(images, index), SimCLRAugmentation(12, blur_prob=0.0).view(images, index))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(small.view(images, index), first)
    assert len(fast._uncompiled) == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_missing_compiler_is_a_failure_to_compile(working_compiler):
    images, index = pictures(4, 8, 8), torch.arange(4)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "a-compiler-that-is-not-there"), "fx_graph_cache": False}),
        torch._functorch.config.patch(enable_autograd_cache=False),
        pytest.warns(UserWarning, match="torch.compile failed: .*a-compiler-that-is-not-there"),
    ):
        view = SimCLRAugmentation(8, compile_views=True).view(images, index)
    assert torch.equal(view, SimCLRAugmentation(8).view(images, index))


@pytest.mark.slow
def test_compiled_views_are_pure_functions_and_the_augmentation_still_pickles(working_compiler):
    chain, pipeline = (SimCLRAugmentation(32, **EVERYTHING, compile_views=on) for on in (True, False))
    images, index = pictures(150, 32, 40), torch.arange(150)
    whole = chain.view(images, index, 1, 2)
    torch.testing.assert_close(whole, pipeline.view(images, index, 1, 2), atol=4 * CLOSE["atol"], rtol=0)  # std=0.25
    shuffle = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chain.view(images[shuffle], index[shuffle], 1, 2), whole[shuffle])
    for parts in (7, 1):
        views = [chain.view(x, i, 1, 2) for x, i in zip(images.split(parts), index.split(parts), strict=True)]
        assert views[0].untyped_storage().nbytes() == views[0].nbytes  # the rest of a part is not kept
        assert torch.equal(torch.cat(views), whole)
    for again in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert torch.equal(again.view(images, index, 1, 2), whole)


@pytest.mark.slow
def test_data_that_change_are_not_compiled_again(working_compiler):
    chain, index = SimCLRAugmentation(16, compile_views=True), torch.arange(60)
    chain.view(pictures(60), index)
    with torch.compiler.set_stance("fail_on_recompile"):
        for epoch, count in enumerate((60, 60, 13), start=1):
            chain.view(pictures(count, seed=epoch), index[:count], epoch)
    assert not fast._uncompiled  # a recompilation would have been a failure, after which Kornia makes the views


@pytest.mark.gpu
@pytest.mark.parametrize("compile_views", [True, False])
@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_on_cuda_nothing_waits_for_the_device_and_the_views_are_those_of_the_cpu(compile_views, settings):
    augmentation = SimCLRAugmentation(64, **settings, compile_views=compile_views)
    images, index = pictures(32, 80, 64), torch.arange(32)
    expected = SimCLRAugmentation(64, **settings).view(images, index, epoch=1)
    on_device = images.cuda()
    augmentation.view(on_device, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = augmentation.view(on_device, index, epoch=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(views.cpu(), expected, atol=2e-4, rtol=0)
