"""Attention to a window against its naive loop: values, every gradient, splitting, packing, stepping.

The same tests run the PyTorch form in float64, the kernels through Triton's interpreter (`-m interpreted`) and on a GPU (`-m gpu`).
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import CPU, CPU_LOW, GATES, GPU, GPU_LOW, INTERPRETED, INTERPRETED_LOW, Setting, gradients, in_float64, in_settings
from support import TOLERANCE, assert_same
from test_operators import every_second_element, odd_offset, reversed_dimensions
from tiles import small_tiles
from torch import Tensor
from window import ONE_HEAD, SEQUENCE, STATE, Drawn, draw, given, gradient_limit

from mmrec.ops import WindowState, window_attention
from mmrec.ops.tuning import overridden
from mmrec.ops.window_attention import pytorch, window_attention_naive
from mmrec.ops.window_attention.decays import launch_decays

pytestmark = pytest.mark.usefixtures("poisoned_memory")
REAL_WIDTHS = [(64, 64), (128, 128), (256, 256), (512, 512), (20, 20), (20, 36), (96, 64)]
windows = pytest.mark.parametrize("window", [1, 7, 21, 64])
everywhere = in_settings([(CPU, 70), (INTERPRETED, 37), (GPU, 700), (GPU_LOW[0], 700)])


def assert_equal_to_the_loop(setting: Setting, drawn: Drawn, gates: str = "ordinary", used: int = 1) -> None:
    """The gradients are those of the first `used` outputs: what comes through the state is so large that it would hide r's."""
    outputs, grads = gradients(lambda **leaves: drawn.of(window_attention)(**leaves)[:used], drawn.inputs, drawn.reset)
    expected_outputs, expected_grads = gradients(
        lambda **leaves: drawn.of(window_attention_naive)(**leaves)[:used], in_float64(drawn.inputs), drawn.reset
    )
    assert [output.dtype for output in outputs] == ([setting.dtype] * 3 + [setting.wide])[:used]
    low = 2 if setting.device == "cpu" and setting.dtype == torch.bfloat16 else 1  # the interpreter cuts bf16 off
    assert_same(outputs[0], expected_outputs[0], limit=low * TOLERANCE[setting.dtype], what="r")
    for actual, expected in zip(outputs[1:], expected_outputs[1:], strict=True):
        assert torch.equal(actual.double(), expected)
    for name, tensor in drawn.inputs.items():
        assert grads[name].dtype == tensor.dtype
        assert_same(grads[name], expected_grads[name], limit=gradient_limit(setting, name, gates), what=f"gradient to {name}")


@windows
@given
@in_settings(
    [
        *((CPU, time) for time in (1, 7, 70)),
        *((setting, 30) for setting in CPU_LOW),
        *((INTERPRETED, time) for time in (1, 37)),
        *((setting, time) for setting in (GPU, *GPU_LOW) for time in (1, 130)),
    ]
)
def test_values_and_gradients_equal_the_naive_loop(setting: Setting, time: int, everything: bool, window: int) -> None:
    assert_equal_to_the_loop(setting, draw(setting, time, window, everything))


@windows
@in_settings([(CPU, 7), (CPU, 30), (CPU_LOW[1], 30), (INTERPRETED, 37), (GPU, 130), (GPU_LOW[2], 130)])
def test_the_last_state_and_gradients_through_it(setting: Setting, time: int, window: int) -> None:
    for everything in (True, False):
        drawn = draw(setting, time, window, everything)
        assert_equal_to_the_loop(setting, drawn, used=4)
        states = [function(*drawn.arguments())[1] for function in (window_attention, window_attention_naive)]
        assert [part.shape for part in states[0]] == [part.shape for part in states[1]]
        assert torch.equal(states[0].seen, states[1].seen)


@pytest.mark.parametrize("gates", [name for name in GATES if name != "ordinary"])
@in_settings([(CPU, 70), (CPU_LOW[0], 70), (INTERPRETED, 37), (INTERPRETED_LOW[0], 37), (GPU, 130), (GPU_LOW[0], 130), (GPU_LOW[1], 130)])
def test_gates_near_their_ends(setting: Setting, time: int, gates: str) -> None:
    assert_equal_to_the_loop(setting, draw(setting, time, 21, gates=gates), gates)


@in_settings([(INTERPRETED_LOW[0], 37), (INTERPRETED_LOW[1], 37), (GPU_LOW[0], 130), (GPU_LOW[1], 130)])
def test_what_a_narrow_read_out_cannot_say(setting: Setting, time: int) -> None:
    """Where a token sees itself but for e^-6, what is left of dS on the diagonal is less than the rounding of r, from which δ is formed."""
    drawn = draw(setting, time, 21)
    for name in ("log_alpha", "state_log_alpha"):
        drawn.inputs[name].fill_(-6.0)
    assert_equal_to_the_loop(setting, drawn)


@given
@in_settings(
    [
        *((setting, 21) for setting in INTERPRETED_LOW),
        *((ONE_HEAD.resized(K=K, V=V), 21) for K, V in ((20, 20), (20, 36), (36, 20), (16, 48))),
        *((GPU_LOW[0].resized(K=K, V=V), time) for K, V in REAL_WIDTHS for time in (1, 130)),
        *((GPU.resized(K=K, V=V), 130) for K, V in REAL_WIDTHS),
    ]
)
def test_dtypes_and_widths(setting: Setting, time: int, everything: bool) -> None:
    assert_equal_to_the_loop(setting, draw(setting, time, 18, everything))


@pytest.mark.parametrize("tiles", [{"BK": 64, "BV": 64}, {"BM": 32}, {"BN": 32}], ids=str)
@in_settings([(ONE_HEAD.resized(K=20, V=36), 43)])
def test_other_tiles(setting: Setting, time: int, tiles: dict[str, int]) -> None:
    """A head in one tile where others take several, and tiles of queries and keys that differ."""
    with overridden(**small_tiles(**tiles)):
        assert_equal_to_the_loop(setting, draw(setting, time, 18))


@pytest.mark.parametrize(
    ("window", "tiles"), [(63, {}), (64, {}), (63, {"BM": 32}), (64, {"BM": 32}), (63, {"BN": 32}), (64, {"BN": 32}), (79, {})], ids=str
)
@given
@in_settings([(ONE_HEAD, 100)])
def test_blocks_of_which_all_is_seen(setting: Setting, time: int, everything: bool, window: int, tiles: dict[str, int]) -> None:
    """Windows of several tiles that end on a tile's border and beside it, documents that begin a key into a tile and at a tile's last
    query; gates by which the farthest key counts as much as the nearest."""
    drawn = draw(setting, time, window, everything, "near 1")
    if drawn.reset is not None:
        begins = torch.tensor([16 + (2 - window) % 16, 79])  # keys begin W − 1 tokens earlier
        drawn.reset.copy_(torch.isin(torch.arange(time), begins))
    with overridden(**small_tiles(**tiles)):
        assert_equal_to_the_loop(setting, drawn)


@pytest.mark.parametrize("window", [128, 600, 5000])
@given
@in_settings(
    [
        *((setting.resized(K=K, V=K), 2049) for setting in GPU_LOW[:2] for K in (64, 128, 256, 512)),
        (GPU, 2049),
        (GPU_LOW[2], 2049),
        (GPU_LOW[0].resized(B=1, H=2), 16_384 + 5),
    ]
)
def test_real_sizes_equal_the_dense_form_in_float64(setting: Setting, time: int, everything: bool, window: int) -> None:
    drawn = draw(setting, time, window, everything)
    outputs, grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    expected_outputs, expected_grads = gradients(drawn.of(window_attention), in_float64(drawn.inputs), drawn.reset)
    assert_same(outputs[0], expected_outputs[0], what="r")
    for name in drawn.inputs:
        limit = gradient_limit(setting, name)
        if name.endswith("log_alpha") and time > 10_000 and setting.dtype == torch.bfloat16:
            limit *= 2  # a difference of two long sums of rounded terms: 0.015 was seen
        assert_same(grads[name], expected_grads[name], limit=limit, what=f"gradient to {name}")


@in_settings([(CPU, 70)])
def test_blocks_of_queries_make_no_difference(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "BLOCK", 16)
    for window in (5, 40):
        assert_equal_to_the_loop(setting, draw(setting, time, window))


@pytest.mark.parametrize("everything", [True, False])
def test_gradcheck(everything: bool) -> None:
    drawn = draw(CPU, 5, 3, everything)
    names = list(drawn.inputs)
    inputs = tuple(tensor.requires_grad_() for tensor in drawn.inputs.values())
    assert torch.autograd.gradcheck(
        lambda *tensors: drawn.of(window_attention)(drawn.reset, **dict(zip(names, tensors, strict=True))), inputs
    )


@windows
@pytest.mark.parametrize("cut", [1, 20, -1])
@everywhere
def test_split_and_carried_equals_whole(setting: Setting, time: int, window: int, cut: int) -> None:
    drawn = draw(setting, time, window)
    cut %= time

    def in_two(reset: Tensor, temperature: Tensor, **leaves: Tensor) -> tuple[Tensor, ...]:
        first, second = ([leaves[name][:, part] for name in SEQUENCE] for part in (slice(cut), slice(cut, None)))
        state = WindowState(*(leaves[name] for name in STATE), drawn.seen)
        head, between = window_attention(*first, temperature, window, state, reset[:, :cut])
        tail, last = window_attention(*second, temperature, window, between, reset[:, cut:])
        assert torch.equal(last.seen, window_attention(*drawn.arguments())[1].seen)
        return torch.cat([head, tail], dim=1), *last[:3]

    outputs, grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    split_outputs, split_grads = gradients(in_two, drawn.inputs, drawn.reset)
    for actual, expected in zip(split_outputs, outputs, strict=True):
        assert_same(actual, expected)
    for name in drawn.inputs:
        assert_same(split_grads[name], grads[name], limit=gradient_limit(setting, name), what=f"gradient to {name}")


@everywhere
def test_packed_equals_document_by_document(setting: Setting, time: int) -> None:
    drawn = draw(setting, time, 21)
    starts = [0, 1, 2 * time // 5, 16 * (time // 25), time - 3, time]
    reset = torch.zeros(setting.sizes["B"], time, dtype=torch.bool, device=setting.device)
    reset[:, starts[1:-1]] = True

    def one_by_one(temperature: Tensor, **leaves: Tensor) -> tuple[Tensor]:
        state = WindowState(*(leaves[name] for name in STATE), drawn.seen)
        results = [
            window_attention(*(leaves[name][:, begin:end] for name in SEQUENCE), temperature, 21, state if begin == 0 else None)[0]
            for begin, end in itertools.pairwise(starts)
        ]
        return (torch.cat(results, dim=1),)

    outputs, grads = gradients(lambda **leaves: drawn.of(window_attention)(**leaves)[:1], drawn.inputs, reset)
    expected_outputs, expected_grads = gradients(one_by_one, drawn.inputs)
    assert_same(outputs[0], expected_outputs[0])
    for name in drawn.inputs:
        assert_same(grads[name], expected_grads[name], limit=gradient_limit(setting, name), what=f"gradient to {name}")
    seen = window_attention(*drawn.arguments()[:-1], reset)[1].seen
    assert torch.equal(seen, (torch.arange(20, device=setting.device) >= 17).expand_as(seen))  # the last document's three tokens


@windows
@in_settings([(CPU, 30), (INTERPRETED, 9), (GPU, 70), (GPU_LOW[0], 70)])
def test_steps_equal_the_whole(setting: Setting, time: int, window: int) -> None:
    drawn = draw(setting, time, window)
    whole, last = window_attention(*drawn.arguments())
    outputs, state = [], drawn.state()
    for t in range(time):
        token = [drawn.inputs[name][:, t : t + 1] for name in SEQUENCE]
        output, state = window_attention(*token, drawn.inputs["temperature"], window, state, drawn.reset[:, t : t + 1])
        outputs.append(output)
    assert_same(torch.cat(outputs, dim=1), whole)
    assert all(torch.equal(actual, expected) for actual, expected in zip(state, last, strict=True))


@pytest.mark.parametrize("layout", [every_second_element, odd_offset, reversed_dimensions])
@in_settings([(CPU, 9), (INTERPRETED, 19), (GPU, 130), (GPU_LOW[0], 130)])
def test_strided_inputs(setting: Setting, time: int, layout: Callable[[Tensor, int], Tensor]) -> None:
    drawn = draw(setting, time, 7)
    buffers = {}
    for name, tensor in drawn.inputs.items():
        buffers[name] = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
        selected = torch.arange(buffers[name].shape[-1], device=tensor.device).expand_as(buffers[name])
        chosen = torch.zeros_like(buffers[name], dtype=torch.bool).scatter(-1, layout(selected, tensor.shape[-1]), True)
        buffers[name].masked_scatter_(chosen, tensor)
    widths = {name: tensor.shape[-1] for name, tensor in drawn.inputs.items()}

    def of_layout(reset: Tensor, **leaves: Tensor) -> tuple[Tensor, ...]:
        return drawn.of(window_attention)(reset, **{name: layout(leaf, widths[name]) for name, leaf in leaves.items()})

    outputs, grads = gradients(of_layout, buffers, drawn.reset)
    expected_outputs, expected_grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected)
    for name in drawn.inputs:
        assert_same(layout(grads[name], widths[name]), expected_grads[name], what=f"gradient to {name}")


@everywhere
def test_two_runs_give_the_same_bits(setting: Setting, time: int) -> None:
    drawn = draw(setting, time, 21)
    outputs, grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    again, grads_again = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    assert all(torch.equal(actual, expected) for actual, expected in zip(again, outputs, strict=True))
    assert all(torch.equal(grads_again[name], grads[name]) for name in drawn.inputs)


@in_settings([(CPU, 5), (CPU_LOW[0], 30), (INTERPRETED, 19), (GPU, 130)])
def test_autocast_changes_nothing(setting: Setting, time: int) -> None:
    drawn = draw(setting, time, 7)
    outputs, grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    autocast_outputs, autocast_grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset, autocast=True)
    assert all(torch.equal(actual, expected) for actual, expected in zip(autocast_outputs, outputs, strict=True))
    assert all(torch.equal(autocast_grads[name], grads[name]) for name in drawn.inputs)


@in_settings([(INTERPRETED, 64), (GPU, 600), (GPU_LOW[0], 600)])
@pytest.mark.parametrize("by", ["window", "reset"])
def test_blocks_that_nobody_sees_are_not_read(setting: Setting, time: int, by: str) -> None:
    """NaN in keys that lie more than a tile before the window, or a document's start, and in cotangents as far behind it."""
    block, window = (16, 7) if time == 64 else (128, 50)
    drawn = draw(setting, time, window if by == "window" else time, everything=False)
    begin = time - 2 * block + window
    reset = None
    if by == "reset":
        reset = torch.zeros(setting.sizes["B"], time, dtype=torch.bool, device=setting.device)
        reset[:, begin] = True
    inputs = {name: tensor.clone() for name, tensor in drawn.inputs.items()}
    for name in "kv":
        inputs[name][:, : begin - block - window] = float("nan")
    r, _ = window_attention(**{**inputs, "window": drawn.window, "reset": reset})
    assert r[:, :2].isnan().all()
    behind = slice(begin + block, None)
    assert_same(r[:, behind], window_attention(*drawn.arguments()[:-1], reset)[0][:, behind])

    leaves = {name: tensor.requires_grad_() for name, tensor in drawn.inputs.items()}
    r, _ = window_attention(**leaves, window=drawn.window, reset=reset)
    dr = torch.ones_like(r)
    dr[:, begin + block + window :] = float("nan")
    for gradient in torch.autograd.grad(r, [leaves["k"], leaves["v"]], dr):
        assert gradient[:, : begin - block].isfinite().all()
        assert gradient[:, -1].isnan().all()


@in_settings([(CPU, 40), (CPU_LOW[0], 40), (INTERPRETED, 37), (GPU, 700), (GPU_LOW[0], 700)])
def test_neither_later_nor_outlived_tokens_count(setting: Setting, time: int) -> None:
    drawn, at, window = draw(setting, time, 7, everything=False), time // 2, 7
    before, _ = window_attention(*drawn.arguments())
    for name in SEQUENCE:
        drawn.inputs[name][:, at] = -1.0
    after, _ = window_attention(*drawn.arguments())
    changed = (after != before).flatten(2).any(-1).any(0)
    assert changed[at : at + window].all()
    assert not changed[:at].any()
    assert_same(after[:, at + window :], before[:, at + window :], torch.float32 if setting.dtype == torch.float64 else None)


@pytest.mark.parametrize("group", [16, 128])
@in_settings([(INTERPRETED, 1), (INTERPRETED, 131_072 - 5), (GPU, 7), (GPU, 131_072 - 5)])
def test_sums_of_decays_keep_their_differences(setting: Setting, time: int, group: int) -> None:
    """Sums down to -10^5, in float64; since a group's first token in fp32, exactly rounded but for float64's own rounding."""
    log_alpha = -torch.rand(2, time, 3, device=setting.device)[..., 1:]
    c, local = launch_decays(log_alpha, group)
    expected = pytorch.log_decays(log_alpha) / math.log(2)
    assert_same(c, expected, limit=1e-14)
    assert local.shape[-1] % group == 0
    starts = expected[..., torch.arange(time, device=setting.device) // group * group]
    assert_same(local[..., :time], expected - starts, limit=1e-7)
    assert (local[..., :time:group] == 0).all()
    assert local.isfinite().all()


@in_settings([(CPU_LOW[0], 30), (INTERPRETED, 37), (GPU, 700)])
def test_only_differences_of_the_sums_count(setting: Setting, time: int) -> None:
    """What has decayed by e^-1000000 before leaves nothing of fp32's digits."""
    drawn = draw(setting, time, 7)
    drawn.inputs["state_log_alpha"].zero_()
    outputs, grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    drawn.inputs["state_log_alpha"][:, 0] = -1e6
    again, grads_again = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    assert_same(again[0], outputs[0], limit=2e-6)
    assert_same(grads_again["q"], grads["q"], limit=2e-6)
